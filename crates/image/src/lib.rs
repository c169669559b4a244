//! Images: references, the content store, the image model, layers (apply, diff), archives and garbage collection.
//!
//! Start at [`Store`]. The interface is synchronous. Identity is always the digest of raw bytes, which are kept as
//! they came; nothing becomes visible before its size and digest are right.

mod adopt;
pub mod archive;
pub mod bootstrap;
mod check;
mod compare;
mod compress;
mod content;
mod digest;
mod embedded;
mod encode;
mod erofs;
mod error;
pub mod explore;
mod follow;
mod index;
pub mod layer;
mod layers;
mod lease;
pub mod media;
pub mod model;
mod names;
mod platform;
mod reference;
mod remove;
mod repack;
mod replica;
mod snapshot;
mod store;
pub mod tar;
mod temp;
pub mod tree;

pub use check::{Checked, Problem};
pub use compare::first_difference;
pub use compress::decode;
pub use content::{Content, DOCUMENT_MAX, Ingest};
pub use digest::{Algorithm, Digest, DigestError, Hasher, Hashing};
pub use embedded::HELLO;
pub use encode::{Encoder, Encoding};
pub use error::{Error, ErrorClass, Result};
pub use follow::{Follow, Follower};
pub use index::Indexed;
pub use layers::LayerInfo;
pub use lease::Lease;
pub use model::{ContainerConfig, Descriptor, Document, History, ImageConfig, Index, Manifest};
pub use platform::{Platform, PlatformError};
pub use reference::{Reference, ReferenceError, valid_tag};
pub use remove::{ContainerUse, ImageUsage, InUse, Pruned, Removed, Usage};
pub use replica::{Change, Replica};
pub use snapshot::{LayerFiles, Lower, Storage, open_union};
pub use store::{HistoryLine, Image, NewImage, Store};
