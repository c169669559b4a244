//! The per-container monitor and its protocol
