//! engage-relay
pub mod document;
pub mod event;
pub mod ingress;
pub mod journal;
pub mod ledger;
pub mod sink;
pub mod template;
