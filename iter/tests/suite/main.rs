//! The crate's suite: guest memory, chains, iterators, extraction, holds.

#[cfg(test)]
mod chain;
#[cfg(test)]
mod extract;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod kinds;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod model;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod pin;
#[cfg(test)]
mod plain;
#[cfg(test)]
mod request;
#[cfg(test)]
mod sigbus;
