//! The real program, from outside: real sockets, real files, real signals. `harness` runs it; each other file is about
//! one subject.

#[cfg(test)]
mod commands;
#[cfg(test)]
mod disk;
#[cfg(test)]
mod harness;
#[cfg(test)]
mod ingress;
