use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use crate::api::RecommendCall;
use crate::wire::client::Client;

/// `tastemaker recommend`
#[derive(Debug, Args)]
pub struct Recommend {
    /// User id; an unknown one is answered from trending and context.
    user: String,
    /// Slate length.
    #[arg(short, long = "n-items", default_value_t = 10)]
    n_items: u32,
    /// Request context; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::key_value)]
    context: Vec<(String, String)>,
    /// Text query.
    #[arg(long)]
    query: Option<String>,
    /// Show each item's sources, scores and rules.
    #[arg(long)]
    explain: bool,
    /// Show where the time went.
    #[arg(long)]
    timings: bool,
    /// Address of the server's binary protocol.
    #[arg(long, default_value = "127.0.0.1:7070")]
    addr: SocketAddr,
    /// Time budget, milliseconds.
    #[arg(long, value_name = "MS")]
    deadline_ms: Option<u64>,
}

impl Recommend {
    pub fn run(self) -> anyhow::Result<()> {
        let budget = self.deadline_ms.map(Duration::from_millis);
        // The server's own word on the deadline comes a little later than the deadline.
        let patience = Duration::from_secs(5) + budget.unwrap_or_default();
        let mut client = Client::connect(self.addr, patience)
            .with_context(|| format!("{}: is `tastemaker serve` running there?", self.addr))?;
        let context: Vec<(&str, &str)> = self.context.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let slate = client.recommend(&RecommendCall {
            user_id: &self.user,
            context: &context,
            n_items: self.n_items,
            query: self.query.as_deref(),
            explain: self.explain,
            timings: self.timings,
            no_cache: false,
            deadline: budget,
        })?;
        say!("{slate}");
        Ok(())
    }
}
