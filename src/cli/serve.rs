use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::device::{self, Choice};
use crate::server;

/// `tastemaker serve`
#[derive(Debug, Args)]
pub struct Serve {
    /// Bundle directory made by `tastemaker build`.
    bundle: PathBuf,
    /// Configuration file; docs/tastemaker.toml shows every key.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
}

/// Flags that override the configuration file.
#[derive(Debug, Args)]
pub struct Overrides {
    /// Where requests are computed: auto, cpu, cuda (all GPUs), or cuda:N[,cuda:M…], which fails where one of them can't be used.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Choice,
    /// Address of the binary protocol [default: 127.0.0.1:7070].
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Address of HTTP/JSON [default: 127.0.0.1:8000].
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// Address of metrics, health and administration [default: 127.0.0.1:8002].
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
    /// CPUs to run on, as in 0,1; one shard each [default: all that the process may use].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cpus: Option<Vec<usize>>,
    /// Turn the result cache off.
    #[arg(long)]
    no_cache: bool,
}

impl Overrides {
    /// Applies the flags that were given.
    pub fn apply(self, config: &mut crate::config::Config) {
        if let Some(addr) = self.listen {
            config.server.listen = addr;
        }
        if let Some(addr) = self.http {
            config.server.http = addr;
        }
        if let Some(addr) = self.admin {
            config.server.admin = addr;
        }
        if let Some(cpus) = self.cpus {
            config.server.cpus = cpus;
        }
        if self.no_cache {
            config.cache.enabled = false;
        }
    }
}

impl Serve {
    pub fn run(self) -> anyhow::Result<()> {
        let mut config = super::config(self.config.as_deref())?;
        let choice = self.overrides.device;
        self.overrides.apply(&mut config);
        crate::telemetry::init(&config.telemetry)?;
        config.validate().map_err(anyhow::Error::msg)?;
        server::run(&self.bundle, config, &device::select(choice)?)
    }
}
