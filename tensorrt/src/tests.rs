//! What of TensorRT needs no GPU: TensorRT-RTX's parser, builder and profiles.

use std::fs;
use std::path::Path;

use crate::build::{Wanted, build, load};
use crate::cache::{Cache, Found};
use crate::library::{Library, for_tests};
use crate::{Capability, Input, Profiles};

const AMPERE: Capability = Capability(8, 6);

struct Model {
    bytes: Vec<u8>,
    inputs: Vec<Input>,
    output: &'static str,
    profiles: Profiles,
}

impl Model {
    fn new(onnx: &str, inputs: &[(&str, usize)], profiles: Profiles) -> Self {
        let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(onnx)).unwrap();
        let inputs = inputs.iter().map(|&(name, width)| Input { name: name.to_owned(), width }).collect();
        Model { bytes, inputs, output: "score", profiles }
    }

    fn demo() -> Self {
        Model::new("engines/demo.onnx", &[("features", 13)], Profiles::new(&[1, 8], 1024).unwrap())
    }

    /// With an input of whole numbers, which pick rows of a table; in another order than the model has them.
    fn ids() -> Self {
        Model::new("tests/golden/ids/ids.onnx", &[("ids", 2), ("numbers", 3)], Profiles::new(&[1], 64).unwrap())
    }

    fn wanted(&self) -> Wanted<'_> {
        let Model { bytes, inputs, output, profiles } = self;
        Wanted { model: bytes, inputs, output, profiles, capability: AMPERE }
    }

    /// Exchanges bytes for as many others, wherever they are.
    fn exchanged(mut self, from: &[u8], to: &[u8]) -> Self {
        assert_eq!(from.len(), to.len());
        let places: Vec<usize> =
            (0..=self.bytes.len() - from.len()).filter(|&at| &self.bytes[at..at + from.len()] == from).collect();
        assert!(!places.is_empty(), "{from:?} is not in the model");
        places.into_iter().for_each(|at| self.bytes[at..at + to.len()].copy_from_slice(to));
        self
    }

    fn refused(&self, library: &'static Library) -> String {
        build(library, &self.wanted()).unwrap_err().to_string()
    }
}

#[test]
fn models_become_engines_for_each_gpu_that_rtx_knows() {
    let Some(library) = for_tests() else { return };
    assert_eq!(library.version, "1.7.1");
    for model in [Model::demo(), Model::ids()] {
        let plan = build(library, &model.wanted()).unwrap();
        assert!(plan.len() > 1000, "{} bytes", plan.len());
        for capability in [Capability(8, 0), Capability(8, 9), Capability(12, 0)] {
            let other = build(library, &Wanted { capability, ..model.wanted() }).unwrap();
            assert!(other.len() > 1000 && other != plan, "{capability}");
        }
        let error = build(library, &Wanted { capability: Capability(9, 0), ..model.wanted() }).unwrap_err();
        assert!(error.to_string().contains("no engines for compute capability 9.0"), "{error}");
    }
}

#[test]
fn a_profile_per_batch_size_is_in_the_engine() {
    let Some(library) = for_tests() else { return };
    let one =
        build(library, &Wanted { profiles: &Profiles::new(&[1], 64).unwrap(), ..Model::demo().wanted() }).unwrap();
    let six = Profiles::new(&[1, 8, 32, 128, 512, 1024], 1024).unwrap();
    let many = build(library, &Wanted { profiles: &six, ..Model::demo().wanted() }).unwrap();
    assert!(many.len() > one.len(), "{} {}", many.len(), one.len());
}

#[test]
fn what_cannot_be_ranked_with_is_refused_in_words() {
    let Some(library) = for_tests() else { return };
    // A dimension named `n` becomes 1: the varint 1 in two bytes.
    let error = Model::demo().exchanged(b"\x0a\x03\x12\x01n", b"\x0a\x03\x08\x81\x00").refused(library);
    assert!(error.contains("takes 1 rows alone"), "{error}");
    let error = Model::demo().exchanged(b"Relu", b"Rolu").refused(library);
    assert!(error.contains("reading the model") && error.contains("Rolu"), "{error}");
    let error = Model { bytes: b"no model".to_vec(), ..Model::demo() }.refused(library);
    assert!(error.contains("reading the model"), "{error}");
    let changed = |change: fn(&mut Model)| {
        let mut model = Model::ids();
        change(&mut model);
        model.refused(library)
    };
    let error = changed(|model| model.inputs[1].width = 4);
    assert!(error.contains("input `numbers` has 3 columns, not 4"), "{error}");
    let error = changed(|model| model.inputs[0].name = "nowhere".into());
    assert!(error.contains("no input `nowhere`; the model has") && error.contains("numbers"), "{error}");
    let error = changed(|model| drop(model.inputs.pop()));
    assert!(error.contains("1 of the model's inputs") && error.contains("numbers"), "{error}");
    let error = changed(|model| model.output = "nowhere");
    assert!(error.contains("no output `nowhere`; the model has score"), "{error}");
}

#[test]
fn an_engine_is_read_back_or_built_anew() {
    let Some(library) = for_tests() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (model, cache) = (Model::demo(), Cache::new(folder.path().to_owned()));
    let (plan, found) = load(library, &model.wanted(), &cache).unwrap();
    assert_eq!(found, Found::Built);
    assert_eq!(load(library, &model.wanted(), &cache).unwrap(), (plan.clone(), Found::Whole));
    let kept = || fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let plans = || kept().filter(|path| path.extension().is_some_and(|e| e == "plan")).collect::<Vec<_>>();
    let [file] = &plans()[..] else { panic!("{:?}", plans()) };
    let whole = fs::read(file).unwrap();
    let version = whole.windows(5).position(|bytes| bytes == b"1.7.1").unwrap();
    let mut foreign = whole.clone();
    foreign[version] = b'2';
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    for (bytes, why) in [(foreign, "another"), (damaged, "checksum"), (whole[..whole.len() / 2].to_vec(), "bytes")] {
        fs::write(file, bytes).unwrap();
        let (again, found) = load(library, &model.wanted(), &cache).unwrap();
        assert!(matches!(&found, Found::Rebuilt(reason) if reason.contains(why)), "{why}: {found:?}");
        assert!(again.len() > 1000);
        assert_eq!(load(library, &model.wanted(), &cache).unwrap(), (again, Found::Whole), "{why}");
    }
    // Anything else that it depends on is another engine.
    let ada = Wanted { capability: Capability(8, 9), ..model.wanted() };
    assert_eq!(load(library, &ada, &cache).unwrap().1, Found::Built);
    let profiles = Profiles::new(&[1], 1024).unwrap();
    assert_eq!(load(library, &Wanted { profiles: &profiles, ..model.wanted() }, &cache).unwrap().1, Found::Built);
    assert_eq!(load(library, &Model::ids().wanted(), &cache).unwrap().1, Found::Built);
    assert_eq!(plans().len(), 4);
}

#[test]
fn of_two_that_want_an_engine_one_builds_it() {
    let Some(library) = for_tests() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = Model::demo();
    let mut found = std::thread::scope(|scope| {
        let threads = [(); 2]
            .map(|()| scope.spawn(|| load(library, &model.wanted(), &Cache::new(folder.path().to_owned())).unwrap()));
        threads.map(|thread| thread.join().unwrap())
    });
    found.sort_by_key(|(_, found)| *found == Found::Whole);
    assert_eq!([&found[0].1, &found[1].1], [&Found::Built, &Found::Whole]);
    assert_eq!(found[0].0, found[1].0);
}
