//! The real program, from outside: real sockets, real files, real signals, real brokers. `harness` runs it, `brokers` and
//! `load` are what it stands between (`balancer` and `fleet`, where there are several relays), `outage` and `rejections`
//! what several sinks are put to; each other file is about one subject.

#[cfg(test)]
mod access;
#[cfg(test)]
mod balancer;
#[cfg(test)]
mod brokers;
#[cfg(test)]
mod cluster;
#[cfg(test)]
mod commands;
#[cfg(test)]
mod crash;
#[cfg(test)]
mod dashboard;
#[cfg(test)]
mod diff;
#[cfg(test)]
mod disk;
#[cfg(test)]
mod everything;
#[cfg(test)]
mod fleet;
#[cfg(test)]
mod fsck;
#[cfg(test)]
mod harness;
#[cfg(test)]
mod ingress;
#[cfg(test)]
mod kafka;
#[cfg(test)]
mod lanes;
#[cfg(test)]
mod load;
#[cfg(test)]
mod metrics;
#[cfg(test)]
mod operating;
#[cfg(test)]
mod outage;
#[cfg(test)]
mod python;
#[cfg(test)]
mod rabbitmq;
#[cfg(test)]
mod recovery;
#[cfg(test)]
mod rejections;
#[cfg(test)]
mod reload;
#[cfg(test)]
mod replicas;
#[cfg(test)]
mod rolling;
#[cfg(test)]
mod secured;
#[cfg(test)]
mod traces;
