//! What a run looks like to people and to scripts.

pub mod charts;
pub mod csv;
pub(crate) mod ink;
pub mod json;
pub mod page;
pub mod plot;
pub mod progress;
pub mod run;
pub mod scenario;
pub mod svg;
pub mod table;

#[cfg(test)]
pub(crate) mod example;
