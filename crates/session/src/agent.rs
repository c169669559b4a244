//! The client's ssh agent at a socket of ours.

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;

use crate::error::{Error, Result};
use crate::messages::BytesMessage;
use crate::session::{Session, add};

/// Bytes of one message.
const CHUNK: usize = 32 << 10;
/// Messages that wait to be sent.
const BACKLOG: usize = 4;

impl Session {
    /// Connects one user of an agent with the client's; returns when either has had enough.
    pub async fn forward_agent(&self, id: &str, socket: UnixStream) -> Result<()> {
        const METHOD: &str = "/moby.sshforward.v1.SSH/ForwardAgent";
        if !self.offers(METHOD) {
            return Err(Error::NotOffered("ssh agents"));
        }
        let mut metadata = MetadataMap::new();
        if !add(&mut metadata, "buildkit.ssh.id", id) {
            return Err(Error::protocol(format!("{id:?} cannot be an agent's name")));
        }
        let what = || format!("forward the ssh agent {id}");
        let (sender, outgoing) = mpsc::channel::<BytesMessage>(BACKLOG);
        let (mut read, mut write) = socket.into_split();
        let questions = async {
            let mut buffer = vec![0; CHUNK];
            loop {
                let n = read.read(&mut buffer).await.unwrap_or(0);
                let data = Bytes::copy_from_slice(&buffer[..n]);
                if n == 0 || sender.send(BytesMessage { data }).await.is_err() {
                    break;
                }
            }
            drop(sender);
            // The answers may still be on their way.
            std::future::pending::<()>().await;
        };
        let answers = async {
            let outgoing = ReceiverStream::new(outgoing);
            let mut stream =
                self.stream::<BytesMessage, BytesMessage>(&what, METHOD, metadata, outgoing).await?;
            while let Some(message) = self.answer(&what, stream.message().await).await? {
                if write.write_all(&message.data).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        tokio::select! {
            () = questions => Ok(()),
            answered = answers => answered,
            () = self.ended() => Err(Error::Ended),
        }
    }
}
