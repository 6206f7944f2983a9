//! engage-relay
pub mod document;
pub mod event;
pub mod journal;
pub mod sink;
pub mod template;
