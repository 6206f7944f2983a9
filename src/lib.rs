//! engage-relay
pub mod document;
pub mod event;
pub mod pointer;
pub mod routing;
pub mod sink;
pub mod template;
