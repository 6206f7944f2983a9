//! engage-relay
pub mod document;
pub mod event;
pub mod sink;
pub mod template;
