use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;

use super::progress::Reporter;
use super::serve::Overrides;
use crate::api::{Event, RecommendCall};
use crate::catalog::build::{self, BuildOptions};
use crate::catalog::bundle;
use crate::catalog::generation::Generation;
use crate::catalog::synthetic::{self, SyntheticOptions};
use crate::config::Config;
use crate::server::{Options, Server, signals};
use crate::wire::client::{Client, SlateAnswer};

/// `tastemaker demo`
#[derive(Debug, Args)]
pub struct Demo {
    /// Items of the synthetic catalogue.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..=2_000_000))]
    items: u32,
    /// Users of the synthetic catalogue.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    users: u32,
    /// Dimension of the embeddings.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=1024))]
    dim: u32,
    /// Show the result and end, instead of serving on.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    overrides: Overrides,
}

/// The demo's ranker ships inside the executable.
const RANKER: &[u8] = include_bytes!("../../engines/demo.onnx");
const MANIFEST: &str = include_str!("../../engines/demo.toml");
const USER: &str = "user-7";

impl Demo {
    pub fn run(self) -> anyhow::Result<()> {
        signals::block().context("blocking signals")?;
        signals::keep_freed_memory();
        let start = Instant::now();
        let work = tempfile::tempdir().context("making a temporary directory")?;
        let generation = self.make(work.path())?;
        say!(
            "built {} items and {} users in {:.1} s",
            generation.items.len(),
            generation.users.len(),
            start.elapsed().as_secs_f64()
        );

        let mut config = Config::default();
        if self.once {
            // Whatever else runs on this machine, the demo finds free ports.
            for addr in [&mut config.server.listen, &mut config.server.http, &mut config.server.admin] {
                addr.set_port(0);
            }
        }
        let selected = crate::device::select(self.overrides.device)?;
        self.overrides.apply(&mut config);
        config.validate().map_err(anyhow::Error::msg)?;
        let options = Options { device: (&selected).into(), ..Options::default() };
        let server = Server::start(generation.clone(), config, options)?;
        let shown = show(&server, &generation);
        if shown.is_err() || self.once {
            server.shut_down()?;
            return shown;
        }
        say!(
            "\nserving: binary {}, HTTP {}, metrics http://{}/metrics; Ctrl-C ends\n\
             try: curl -s http://{}/v1/recommend -d '{{\"user_id\":\"user-42\",\"n_items\":5,\"query\":\"silent city\"}}'",
            server.addrs.binary,
            server.addrs.http,
            server.addrs.admin,
            server.addrs.http
        );
        signals::wait();
        server.shut_down()
    }

    fn make(&self, work: &Path) -> anyhow::Result<Arc<Generation>> {
        let (data, out) = (work.join("dataset"), work.join("bundle"));
        let progress = Reporter::new();
        progress.begin("making a catalogue", 0);
        let options = SyntheticOptions {
            n_items: self.items as usize,
            n_users: self.users as usize,
            dim: self.dim as usize,
            seed: 1,
        };
        synthetic::generate(&data, &options)?;
        let rankers = data.join("rankers");
        std::fs::create_dir_all(&rankers)?;
        std::fs::write(rankers.join("demo.onnx"), RANKER)?;
        std::fs::write(rankers.join("demo.toml"), MANIFEST)?;
        build::build(&data, &out, &BuildOptions::default(), &progress)?;
        let generation = bundle::open(&out)?;
        progress.finish();
        Ok(Arc::new(generation))
    }
}

/// What a user did, and what the server makes of it, for a user whose history it knows and for one that it does not.
fn show(server: &Server, generation: &Generation) -> anyhow::Result<()> {
    let mut client = Client::connect(server.addrs.binary, Duration::from_secs(10))?;
    let row = generation.users.ids.row(USER).context("the demo's user is missing")?;
    let history: Vec<_> = generation.histories.of(row).filter(|i| i.weight > 0.0).collect();
    say!("\n{USER} liked {} items, most recently:", history.len());
    for entry in history.iter().rev().take(5) {
        say!("      {}", described(generation, entry.row));
    }
    let start = Instant::now();
    let slate = client.recommend(&RecommendCall { explain: true, timings: true, ..RecommendCall::new(USER, 10) })?;
    say!("\nrecommended to {USER} ({:.1} ms):", start.elapsed().as_secs_f64() * 1e3);
    print(generation, &slate)?;
    let times: Vec<String> = slate.timings.iter().map(|(stage, us)| format!("{stage} {us:.0}")).collect();
    say!("µs: {}", times.join(", "));
    let slate = client.recommend(&RecommendCall::new("somebody-new", 5))?;
    say!("\nrecommended to a user never seen before:");
    print(generation, &slate)?;
    let liked: Vec<u32> = history.iter().rev().take(3).map(|entry| entry.row).collect();
    let events: Vec<Event<'_>> =
        liked.iter().map(|&row| Event::new("somebody-new", generation.items.ids.id(row), "like")).collect();
    server.shared().live.prepare_fold_in();
    client.put_events(&events, false)?;
    let slate = client.recommend(&RecommendCall::new("somebody-new", 5))?;
    say!("\nand after three events, who liked:");
    for &row in &liked {
        say!("      {}", described(generation, row));
    }
    print(generation, &slate)
}

fn print(generation: &Generation, slate: &SlateAnswer) -> anyhow::Result<()> {
    say!("rank   score  item");
    for (at, item) in slate.items.iter().enumerate() {
        let row = generation.items.ids.row(&item.item_id);
        let text = row.map_or_else(|| item.item_id.clone(), |row| described(generation, row));
        say_part!("{:>4} {:>7.3}  {text}", at + 1, item.score);
        match item.explanation.as_str() {
            "" => say!(""),
            why => say!("\n              {why}"),
        }
    }
    Ok(())
}

fn described(generation: &Generation, row: u32) -> String {
    let text = |role: Option<usize>| {
        let data = &generation.items.columns[role?].data;
        data.codes(row).first().and_then(|&code| Some(data.vocabulary()?.id(code).to_owned()))
    };
    let title = text(generation.roles.title).unwrap_or_else(|| generation.items.ids.id(row).to_owned());
    let creator = text(generation.roles.creator).map(|c| format!(" by {c}")).unwrap_or_default();
    let category = text(generation.roles.category).map(|c| format!(" ({c})")).unwrap_or_default();
    format!("{title}{creator}{category}")
}
