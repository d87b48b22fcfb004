//! Guest memory, directed iterators over descriptor chains, holds and the dirty log.
