//! The whole path without KVM, on [`crate::fake`].

mod enabling;
mod resets;
mod turns;
