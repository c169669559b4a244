//! Containers, execs, volumes, events, policies: the domain
