//! The Engine API server
