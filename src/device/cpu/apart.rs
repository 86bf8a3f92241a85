//! Recommendations of which another device finds the neighbours and ranks: what depends on neither.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::live::line;
use super::{Asked, CpuDevice, Gathered, Loaded, Scratch, fold_in, proposed_by_nobody};
use crate::candidates::{Dependence, Scored, Source};
use crate::catalog::generation::Generation;
use crate::catalog::live::LiveItems;
use crate::context::Stage;
use crate::device::{Device, DeviceError, Job};
use crate::features::assemble::Layout;
use crate::pipeline::PipelineConfig;
use crate::ranking::dense::Model;
use crate::ranking::expression::Expression;
use crate::ranking::manifest::Engine;

/// A ranker of which a recommendation's score is made.
#[derive(Clone)]
pub struct Weighted {
    /// Position in [`Generation::rankers`].
    pub at: usize,
    /// Its name.
    pub name: String,
    /// Its share in the mean.
    pub weight: f32,
    /// The columns of candidates, each one value wide; `None`: it is not computed in parts.
    pub columns: Option<Layout>,
    /// What computes it here, where that is the engine for dense networks.
    pub model: Option<Arc<Model>>,
    /// Its whole rows, for an engine that takes those: where one is asked for, or nothing here computes it in parts.
    pub whole: Option<Arc<Whole>>,
}

/// What the rows of a model's inputs are put together of, and the model, for an engine of another device.
pub struct Whole {
    /// Whose items there are.
    pub generation: Arc<Generation>,
    /// The model's file.
    pub onnx: PathBuf,
    /// The name of the output that is the score, or why there is no such one.
    pub output: Result<String, String>,
    /// The inputs' names.
    pub names: Vec<String>,
    /// By input: of each value what it depends on, and its place in the row of that layout.
    pub places: Vec<Vec<(Dependence, usize)>>,
    /// The columns of all inputs, by [`Dependence`].
    pub layouts: [Layout; 3],
}

impl Whole {
    /// The ranker in that position of the generation, whose inputs have these columns.
    fn new(generation: &Arc<Generation>, at: usize, inputs: &[Layout]) -> Self {
        let model = &generation.rankers[at];
        let mut taken = [0; 3];
        let mut place = |of: Dependence| {
            taken[of as usize] += 1;
            (of, taken[of as usize] - 1)
        };
        let places = inputs.iter().map(|input| input.dependences().into_iter().map(&mut place).collect()).collect();
        let output = model.manifest.output.expression().and_then(|(score, mut names)| match score {
            Expression::Output(0) => Ok(names.swap_remove(0)),
            _ => Err("`output.score` combines outputs, which is not done there: put that into the model".to_owned()),
        });
        Whole {
            generation: generation.clone(),
            onnx: model.onnx.clone(),
            output,
            names: model.manifest.inputs.iter().map(|input| input.name.clone()).collect(),
            places,
            layouts: Dependence::ALL.map(|of| Layout::part(inputs, |own| own == of)),
        }
    }

    /// Values of a row, by [`Dependence`].
    pub fn widths(&self) -> [usize; 3] {
        [0, 1, 2].map(|of| self.layouts[of].width())
    }
}

impl CpuDevice {
    /// The rankers of which a recommendation's score is made, in their order.
    ///
    /// # Errors
    /// As [`Device::load`].
    pub fn weighted(&mut self, generation: &Arc<Generation>) -> Result<Vec<Weighted>, DeviceError> {
        self.load(generation)?;
        let loaded = self.loaded.iter_mut().find(|loaded| Arc::ptr_eq(&loaded.generation, generation));
        let rankers = loaded.into_iter().flat_map(|loaded| loaded.rankers.iter_mut().enumerate());
        let config = &self.config;
        let weighted = rankers.filter(|(_, ranker)| ranker.weight > 0.0).map(|(at, ranker)| {
            let in_parts = ranker.parts.is_some();
            let whole = generation.rankers.get(at).filter(|model| match config.engine(&model.name, &model.manifest) {
                Engine::TensorRt => true,
                Engine::Auto => !in_parts,
                _ => false,
            });
            let whole = whole.map(|_| Arc::new(Whole::new(generation, at, &ranker.layouts)));
            let parts = ranker.parts.as_ref().map(|[_, candidates]| candidates);
            let candidates = whole.as_ref().map(|whole| &whole.layouts[Dependence::Candidate as usize]).or(parts);
            Weighted {
                at,
                name: ranker.ranker.name().to_owned(),
                weight: ranker.weight,
                columns: candidates.cloned(),
                model: ranker.ranker.dense().map(|dense| dense.model().clone()),
                whole,
            }
        });
        Ok(weighted.collect())
    }

    /// Asks all sources but the neighbours for a job's candidates and hands over, by `rankers`, what the request gives to their scores.
    /// `None`: that can't be had, and the job is better computed here as a whole.
    ///
    /// # Errors
    /// As [`Device::load`].
    pub fn begin(
        &mut self,
        job: &mut Job,
        rankers: &[Weighted],
        put: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Option<&[Vec<Scored>; Source::COUNT]>, DeviceError> {
        self.load(&job.generation)?;
        let Self { loaded, scratch, config, .. } = self;
        let Some(loaded) = loaded.iter_mut().find(|loaded| Arc::ptr_eq(&loaded.generation, &job.generation)) else {
            return Ok(None);
        };
        loaded.renew_index();
        match catch_unwind(AssertUnwindSafe(|| loaded.begin(config, scratch, job, rankers, put))) {
            Ok(true) => Ok(Some(&scratch.lists)),
            Ok(false) => Ok(None),
            Err(_) => {
                *scratch = Scratch::default();
                Ok(None)
            }
        }
    }

    /// What a ranker of another device keeps of an item that came or changed: what its table here would have, or the item's columns of
    /// whole rows. The first that asks computes it.
    ///
    /// # Errors
    /// As [`Device::load`], or the ranker keeps nothing of items.
    pub fn line(
        &mut self,
        generation: &Arc<Generation>,
        weighted: &Weighted,
        items: &LiveItems,
        row: u32,
        out: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        if let Some(whole) = &weighted.whole {
            let layout = &whole.layouts[Dependence::Item as usize];
            layout.fill_item(generation, items, row, &mut self.scratch.features, out);
            return Ok(());
        }
        self.load(generation)?;
        let Self { loaded, scratch, .. } = self;
        let loaded = loaded.iter_mut().find(|loaded| Arc::ptr_eq(&loaded.generation, generation));
        let ranker = loaded.and_then(|loaded| loaded.rankers.get_mut(weighted.at));
        let line = ranker.and_then(|ranker| line(ranker, weighted.at, (generation, items), row, &mut scratch.features));
        let Some(line) = line else {
            return Err(DeviceError::Failed(format!("ranker `{}` keeps nothing of items", weighted.name)));
        };
        out.clear();
        out.extend_from_slice(&line);
        Ok(())
    }

    /// Fills up what a job that was begun got from elsewhere, where that is less than it wants.
    pub fn fill_up(&mut self, job: &mut Job, top_m: usize) {
        let loaded = self.loaded.iter().find(|loaded| Arc::ptr_eq(&loaded.generation, &job.generation));
        if let Some(loaded) = loaded.filter(|_| job.ranked.items.len() < top_m) {
            loaded.mark_seen(&mut self.scratch, job);
            loaded.backfill(&mut self.scratch, job, top_m);
        }
    }
}

impl Loaded {
    fn begin(
        &mut self,
        config: &PipelineConfig,
        scratch: &mut Scratch,
        job: &mut Job,
        rankers: &[Weighted],
        put: &mut dyn FnMut(usize, &[f32]),
    ) -> bool {
        fold_in(&self.generation, config, scratch, job);
        self.mark_seen(scratch, job);
        self.retrieve(config, scratch, job, Asked { elsewhere: true, ..Asked::NONE });
        // Columns of the request are the same for whatever candidate.
        let clock = Instant::now();
        scratch.candidates.clear();
        scratch.candidates.rows.push(0);
        proposed_by_nobody(&mut scratch.candidates);
        let Scratch { signals, candidates, features, inputs, part, .. } = scratch;
        inputs.resize_with(inputs.len().max(1), Vec::new);
        let mut all = true;
        for (nth, weighted) in rankers.iter().enumerate() {
            let Some(loaded) = self.rankers.get_mut(weighted.at) else { return false };
            let whole = weighted.whole.as_ref().map(|whole| &whole.layouts[Dependence::Request as usize]);
            let parts = loaded.parts.as_ref().map(|[request, _]| request);
            let Some(request) = whole.or(parts) else { return false };
            let gathered = Gathered { generation: &self.generation, index: None, job, signals, candidates };
            gathered.fill(request, 1, features, &mut inputs[0]);
            match loaded.ranker.dense().filter(|_| whole.is_none()) {
                Some(dense) => {
                    part.clear();
                    part.resize(dense.model().shared_width(), 0.0);
                    match dense.share(&inputs[0], part) {
                        Ok(()) => put(nth, part),
                        Err(error) => {
                            tracing::warn!(%error, "ranker failed");
                            all = false;
                        }
                    }
                }
                // Its columns are all that there is.
                None => put(nth, &inputs[0]),
            }
        }
        job.timings.lap(Stage::Features, clock);
        all
    }
}

/// Rankers that tests make.
#[cfg(test)]
pub(crate) mod testing {
    use super::super::rankers::LoadedRanker;
    use super::*;
    use crate::features::assemble::Layout;
    use crate::ranking::Ranker;

    /// A ranker in parts, with the columns of requests and of candidates, which it is given as its two inputs, and its weight.
    pub(crate) type Made = (Box<dyn Ranker>, [Vec<String>; 2], f32);

    /// Loads the generation with these rankers.
    pub(crate) fn load(device: &mut CpuDevice, generation: &Arc<Generation>, rankers: Vec<Made>) {
        let of = |(ranker, columns, weight): Made| {
            let layouts = columns.map(|columns| Layout::compile(&columns, generation).unwrap());
            LoadedRanker { layouts: layouts.to_vec(), ranker, parts: Some(layouts), items: None, weight }
        };
        let rankers = rankers.into_iter().map(of).collect();
        let (index_changes, index) = (generation.index_changes(), generation.index());
        device.loaded.push_front(Loaded { generation: generation.clone(), index, index_changes, rankers });
    }
}
