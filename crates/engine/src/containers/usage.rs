//! What all running containers use, for metrics.

use std::sync::Arc;

use brigantine_runtime::cgroup::Stats;
use futures_util::StreamExt;
use jiff::Timestamp;

use super::{Container, Containers};

/// Monitors asked at once.
const AT_ONCE: usize = 16;

/// One running container's use.
#[derive(Debug, Clone)]
pub struct Usage {
    pub id: String,
    pub name: String,
    pub image: String,
    pub started_at: Timestamp,
    pub restarts: i64,
    /// `None` without a health check.
    pub healthy: Option<bool>,
    pub stats: Stats,
    pub interfaces: Vec<InterfaceUse>,
}

/// Bytes of one interface, as the container counts.
#[derive(Debug, Clone)]
pub struct InterfaceUse {
    pub name: String,
    pub received: u64,
    pub sent: u64,
}

impl Containers {
    /// Every running container; one that ends meanwhile is left out.
    pub async fn usages(self: &Arc<Self>) -> Vec<Usage> {
        let asked = self.all().into_iter().filter(|container| container.live().is_some());
        let mut all: Vec<Usage> = futures_util::stream::iter(asked.map(|container| self.usage(container)))
            .buffer_unordered(AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await;
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }

    async fn usage(self: &Arc<Self>, container: Arc<Container>) -> Option<Usage> {
        let live = container.live()?;
        let stats = live.ask(brigantine_shim::Client::stats).await.ok()?;
        let interfaces = if live.sandbox().attachment.is_some() {
            let (plumbing, id, running) = (self.networks.plumbing(), container.id.clone(), Arc::clone(&live));
            let counters = move || plumbing.counters(&id, || super::plug::namespace(&running).ok());
            crate::blocking(counters).await.unwrap_or_default()
        } else {
            Vec::new()
        };
        Some(container.with(|inner| {
            Usage {
                id: inner.record.id.clone(),
                name: inner.record.name.clone(),
                image: inner.record.image().to_owned(),
                started_at: live.started_at,
                restarts: inner.record.restart_count,
                healthy: match inner.health_status() {
                    "none" => None,
                    status => Some(status == "healthy"),
                },
                stats,
                interfaces: interfaces
                    .into_iter()
                    .map(|(name, counters)| InterfaceUse {
                        name,
                        received: counters.rx_bytes,
                        sent: counters.tx_bytes,
                    })
                    .collect(),
            }
        }))
    }
}
