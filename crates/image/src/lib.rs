//! Content store, image model, layers (apply, diff), snapshots, garbage collection
