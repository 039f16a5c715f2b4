//! What a run looks like to people and to scripts.

pub mod json;
pub mod progress;
pub mod svg;

pub mod table;

#[cfg(test)]
pub(crate) mod example;
