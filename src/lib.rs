//! engage-relay takes the webhooks by which Aivo Engage reports what became of each message, stores them durably, and
//! forwards them to Kafka, RabbitMQ and HTTP by the rules in `routes.toml`.
//!
//! ```text
//!             ┌─ ingress ─┐      ┌─ journal ─┐      ┌─ lane: one per sink ─────────────────┐
//!  webhook ─▶ │ auth, cap │ ───▶ │ append,   │ ───▶ │ read on from cursor ▸ route? ▸ order │ ─▶ sink ─▶ Kafka,
//!             │ parse     │ ◀─── │ group     │      │   └ failed: park in ledger, retry    │    RabbitMQ, HTTP,
//!    200 ◀─── └───────────┘ ack  │ fsync     │      │   └ hopeless: dead letter ─▶ ledger  │    stdout
//!                                └───────────┘      └──────────────────────────────────────┘
//! ```
//!
//! The parts in reading order: [`event`] is what moves; [`ingress`] takes it, [`journal`] keeps it, a [`lane`] carries
//! it to its [`sink`] and notes in the [`ledger`] how far it has come; [`routing`] says which events are whose.
//! [`relay`] puts them together. [`config`] and [`rules`] read what the user has written, by way of [`document`] and
//! [`template`]; [`signature`] and [`tls`] are what ingress, sinks and the admin side share; [`cli`] has the commands.

pub mod admin;
pub mod cli;
pub mod config;
pub mod document;
pub mod event;
pub mod ingress;
pub mod journal;
pub mod kafka;
pub mod lane;
pub mod ledger;
pub mod pointer;
pub mod relay;
pub mod reload;
pub mod routing;
pub mod rules;
pub mod signature;
pub mod sink;
pub mod telemetry;
pub mod template;
pub mod tls;
