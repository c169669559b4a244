//! Messages as they are on the wire (protobuf; field numbers are moby/buildkit's and fsutil's).
//!
//! Paths are bytes here, not strings: a file's name need not be UTF-8, and the two look the same on the wire.

use bytes::Bytes;
use prost::{Enumeration, Message};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Enumeration)]
#[repr(i32)]
pub(crate) enum PacketKind {
    Stat = 0,
    Request = 1,
    Data = 2,
    Fin = 3,
    Error = 4,
}

/// fsutil.types.Packet.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Packet {
    #[prost(enumeration = "PacketKind", tag = "1")]
    pub kind: i32,
    #[prost(message, optional, tag = "2")]
    pub stat: Option<Stat>,
    #[prost(uint32, tag = "3")]
    pub id: u32,
    #[prost(bytes = "bytes", tag = "4")]
    pub data: Bytes,
}

impl Packet {
    pub fn of(kind: PacketKind, id: u32, data: Bytes) -> Self {
        Self { kind: kind as i32, stat: None, id, data }
    }
}

/// fsutil.types.Stat; the mode is Go's `os.FileMode`, the time nanoseconds since the epoch.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Stat {
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    #[prost(uint32, tag = "3")]
    pub uid: u32,
    #[prost(uint32, tag = "4")]
    pub gid: u32,
    #[prost(int64, tag = "5")]
    pub size: i64,
    #[prost(int64, tag = "6")]
    pub mtime: i64,
    #[prost(bytes = "vec", tag = "7")]
    pub linkname: Vec<u8>,
    #[prost(int64, tag = "8")]
    pub devmajor: i64,
    #[prost(int64, tag = "9")]
    pub devminor: i64,
    /// Ours: see [`crate::Entry::state`].
    #[prost(fixed64, tag = "1001")]
    pub state: u64,
}

/// moby.filesync.v1.BytesMessage, moby.sshforward.v1.BytesMessage, moby.upload.v1.BytesMessage.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct BytesMessage {
    #[prost(bytes = "bytes", tag = "1")]
    pub data: Bytes,
}

/// moby.filesync.v1.CredentialsRequest.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct CredentialsRequest {
    #[prost(string, tag = "1")]
    pub host: String,
}

/// moby.filesync.v1.CredentialsResponse.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct CredentialsResponse {
    #[prost(string, tag = "1")]
    pub username: String,
    #[prost(string, tag = "2")]
    pub secret: String,
}

/// moby.filesync.v1.FetchTokenRequest.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct TokenRequest {
    #[prost(string, tag = "1")]
    pub client: String,
    #[prost(string, tag = "2")]
    pub host: String,
    #[prost(string, tag = "3")]
    pub realm: String,
    #[prost(string, tag = "4")]
    pub service: String,
    #[prost(string, repeated, tag = "5")]
    pub scopes: Vec<String>,
}

/// moby.filesync.v1.FetchTokenResponse.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct TokenResponse {
    #[prost(string, tag = "1")]
    pub token: String,
}

/// moby.buildkit.secrets.v1.GetSecretRequest.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SecretRequest {
    #[prost(string, tag = "1")]
    pub id: String,
}

/// moby.buildkit.secrets.v1.GetSecretResponse.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SecretResponse {
    #[prost(bytes = "bytes", tag = "1")]
    pub data: Bytes,
}

/// moby.sshforward.v1.CheckAgentRequest.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct CheckAgentRequest {
    #[prost(string, tag = "1")]
    pub id: String,
}

/// containerd.services.content.v1.InfoRequest.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContentInfoRequest {
    #[prost(string, tag = "1")]
    pub digest: String,
}

/// containerd.services.content.v1.InfoResponse.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContentInfoResponse {
    #[prost(message, optional, tag = "1")]
    pub info: Option<ContentInfo>,
}

/// containerd.services.content.v1.Info, as far as it is used.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContentInfo {
    #[prost(string, tag = "1")]
    pub digest: String,
    #[prost(int64, tag = "2")]
    pub size: i64,
}

/// containerd.services.content.v1.ReadContentRequest; a size of 0 is everything.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContentReadRequest {
    #[prost(string, tag = "1")]
    pub digest: String,
    #[prost(int64, tag = "2")]
    pub offset: i64,
    #[prost(int64, tag = "3")]
    pub size: i64,
}

/// containerd.services.content.v1.ReadContentResponse.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContentReadResponse {
    #[prost(int64, tag = "1")]
    pub offset: i64,
    #[prost(bytes = "bytes", tag = "2")]
    pub data: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Enumeration)]
#[repr(i32)]
pub(crate) enum WriteAction {
    Stat = 0,
    Write = 1,
    Commit = 2,
}

/// containerd.services.content.v1.WriteContentRequest, as far as it is used.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContentWriteRequest {
    #[prost(enumeration = "WriteAction", tag = "1")]
    pub action: i32,
    #[prost(string, tag = "2")]
    pub reference: String,
    #[prost(int64, tag = "3")]
    pub total: i64,
    #[prost(string, tag = "4")]
    pub expected: String,
    #[prost(int64, tag = "5")]
    pub offset: i64,
    #[prost(bytes = "bytes", tag = "6")]
    pub data: Bytes,
}

/// containerd.services.content.v1.WriteContentResponse, as far as it is used.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ContentWriteResponse {
    #[prost(enumeration = "WriteAction", tag = "1")]
    pub action: i32,
    #[prost(int64, tag = "4")]
    pub offset: i64,
    #[prost(int64, tag = "5")]
    pub total: i64,
    #[prost(string, tag = "6")]
    pub digest: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Empty {}

/// google.protobuf.Timestamp.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Timestamp {
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

/// moby.buildkit.v1.StatusResponse: what happened in a build since the last one.
#[derive(Clone, PartialEq, Message)]
pub struct Status {
    #[prost(message, repeated, tag = "1")]
    pub vertexes: Vec<StatusVertex>,
    #[prost(message, repeated, tag = "2")]
    pub statuses: Vec<StatusVertexProgress>,
    #[prost(message, repeated, tag = "3")]
    pub logs: Vec<StatusLog>,
    #[prost(message, repeated, tag = "4")]
    pub warnings: Vec<StatusWarning>,
}

/// moby.buildkit.v1.Vertex.
#[derive(Clone, PartialEq, Message)]
pub struct StatusVertex {
    #[prost(string, tag = "1")]
    pub digest: String,
    #[prost(string, repeated, tag = "2")]
    pub inputs: Vec<String>,
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(bool, tag = "4")]
    pub cached: bool,
    #[prost(message, optional, tag = "5")]
    pub started: Option<Timestamp>,
    #[prost(message, optional, tag = "6")]
    pub completed: Option<Timestamp>,
    #[prost(string, tag = "7")]
    pub error: String,
}

/// moby.buildkit.v1.VertexStatus.
#[derive(Clone, PartialEq, Message)]
pub struct StatusVertexProgress {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub vertex: String,
    #[prost(string, tag = "3")]
    pub name: String,
    #[prost(int64, tag = "4")]
    pub current: i64,
    #[prost(int64, tag = "5")]
    pub total: i64,
    #[prost(message, optional, tag = "6")]
    pub timestamp: Option<Timestamp>,
    #[prost(message, optional, tag = "7")]
    pub started: Option<Timestamp>,
    #[prost(message, optional, tag = "8")]
    pub completed: Option<Timestamp>,
}

/// moby.buildkit.v1.VertexLog; the stream is 1 or 2.
#[derive(Clone, PartialEq, Message)]
pub struct StatusLog {
    #[prost(string, tag = "1")]
    pub vertex: String,
    #[prost(message, optional, tag = "2")]
    pub timestamp: Option<Timestamp>,
    #[prost(int64, tag = "3")]
    pub stream: i64,
    #[prost(bytes = "vec", tag = "4")]
    pub msg: Vec<u8>,
}

/// moby.buildkit.v1.VertexWarning, as far as it is used.
#[derive(Clone, PartialEq, Message)]
pub struct StatusWarning {
    #[prost(string, tag = "1")]
    pub vertex: String,
    #[prost(int64, tag = "2")]
    pub level: i64,
    #[prost(bytes = "vec", tag = "3")]
    pub short: Vec<u8>,
}
