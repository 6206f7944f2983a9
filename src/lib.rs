//! engage-relay
pub mod document;
pub mod event;
pub mod pointer;
pub mod sink;
pub mod template;
