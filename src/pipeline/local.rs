//! The pipeline in one thread, without a server: for `eval`, `features` and tests.

use std::sync::Arc;
use std::time::Instant;

use rten::ThreadPool;

use super::{FinishScratch, PipelineConfig, execute, plan};
use crate::api::{RecommendCall, Slate};
use crate::catalog::generation::Generation;
use crate::config::Config;
use crate::device::cpu::CpuDevice;
use crate::device::{Device, Job, Ranked};
use crate::error::{Code, Error};
use crate::rerank::Reranker;

/// One thread's pipeline over one generation.
pub struct LocalPipeline {
    device: CpuDevice,
    generation: Arc<Generation>,
    reranker: Reranker,
    config: Arc<PipelineConfig>,
    job: Box<Job>,
    scratch: FinishScratch,
}

impl LocalPipeline {
    /// Loads the generation's rankers and compiles the rules.
    ///
    /// # Errors
    /// A ranker that can't be loaded, a rule that can't be compiled.
    pub fn new(config: &Config, generation: Arc<Generation>) -> anyhow::Result<Self> {
        let pipeline = Arc::new(config.pipeline.clone());
        let mut device = CpuDevice::new(pipeline.clone(), Arc::new(ThreadPool::with_num_threads(1)));
        device.load(&generation)?;
        Ok(LocalPipeline {
            device,
            reranker: Reranker::compile(&config.rerank, &generation)?,
            config: pipeline,
            job: Box::new(Job::new(generation.clone())),
            generation,
            scratch: FinishScratch::default(),
        })
    }

    /// The generation.
    pub fn generation(&self) -> &Arc<Generation> {
        &self.generation
    }

    /// Answers a call as the server would.
    ///
    /// # Errors
    /// As the server would.
    pub fn answer(&mut self, call: &RecommendCall<'_>) -> Result<Slate, Error> {
        let Self { device, generation, reranker, config, job, scratch } = self;
        execute(device, generation, reranker, config, call, job, scratch)
    }

    /// A slate without context.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub fn recommend(&mut self, user_id: &str, n_items: u32) -> Result<Slate, Error> {
        self.answer(&RecommendCall::new(user_id, n_items))
    }

    /// All merged candidates of a user in the ranker's order, with what each source said.
    ///
    /// # Errors
    /// As [`Self::answer`].
    pub fn candidates(&mut self, user_id: &str) -> Result<&Ranked, Error> {
        let call = RecommendCall { explain: true, ..RecommendCall::new(user_id, self.config.default_n_items) };
        plan::recommend(&call, &self.generation, None, &self.reranker, &self.config, Instant::now(), &mut self.job)?;
        plan::resolve_user(&self.generation, None, None, &self.config, &mut self.job)?;
        self.job.task = crate::device::Task::Recommend { top_m: u32::from(u16::MAX), explain: true };
        let ran = self.device.execute(std::slice::from_mut(&mut self.job));
        ran.map_err(|_| Error::fixed(Code::Unavailable, "the device failed"))?;
        match self.job.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(&self.job.ranked),
        }
    }

    /// The merged candidates of a user and their feature matrix for `columns`, `[candidates, width]`.
    ///
    /// # Errors
    /// A column that does not exist, or as [`Self::answer`].
    pub fn features(&mut self, user_id: &str, columns: &[String]) -> anyhow::Result<(Vec<u32>, Vec<f32>, usize)> {
        let rows = self.candidates(user_id)?.candidates.rows.clone();
        let (matrix, width) = self.device.features(&self.job, columns)?;
        Ok((rows, matrix, width))
    }
}
