//! Block devices behind one trait.
