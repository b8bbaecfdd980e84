//! Adapters that come and go over one base. Alone in its process: the heap counts for all that runs there.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use lora_core::{
    Tensor,
    peft::{Adapted, Base, Options, find},
};
use lora_kernels::{CountingHeap, DType, Device, axpby, heap_stats, release_idle_memory};
use lora_model::{
    Gpt2, LoadOptions, Model, Texts,
    adapter::{self, Adapters},
    assemble,
    config::Gpt2Config,
};
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

const CPU: Device = Device::Cpu;
const NAMES: [&str; 3] = ["a", "b", "c"];

fn bits(base: &dyn Base) -> Vec<Vec<u32>> {
    let bits = |t: &Tensor| t.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    base.tensors().map(|(_, t)| bits(t)).collect()
}

/// The base with other values of some tensors: a model without an adapter.
fn whole(base: &Gpt2, changed: &BTreeMap<String, Tensor>) -> Box<dyn Model> {
    let mut fetch = |name: &str, _shape: &[usize]| {
        Ok(changed.get(name).or_else(|| base.tensor(name)).expect("a tensor of the base").clone())
    };
    assemble(base.config().clone(), &CPU, &LoadOptions::default(), &mut fetch).unwrap()
}

#[test]
fn a_thousand_operations_leave_the_base_and_the_memory_as_they_were() {
    let config =
        Gpt2Config { vocab_size: 60, n_positions: 16, n_embd: 32, n_layer: 2, n_head: 2, ..Gpt2Config::small() };
    let base = Gpt2::init(config, Path::new("base"), 0, &CPU).unwrap();
    let before = bits(&base);
    let folders: Vec<_> = [("lora", 2), ("lora", 5), ("ia3", 0)]
        .into_iter()
        .map(|(method, rank)| {
            let options = Options { rank: rank.max(1), alpha: 4.0, ..Options::default() };
            let build = (find(method).unwrap().build)(&options).unwrap();
            let mut adapted = Adapted::new(&*build, &base, &CPU, DType::F32, rank as u64).unwrap();
            let flat = adapted.params.flat();
            axpby(0.5, flat.mat(), 0.5, adapted.params.flat_mut().unwrap()).unwrap();
            let dir = tempfile::tempdir().unwrap();
            adapter::save(dir.path(), method, &options, &adapted, &base, None).unwrap();
            dir
        })
        .collect();

    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let (mut adapters, mut in_use): (Adapters, Option<Arc<Adapted>>) = (Adapters::new(), None);
    let mut merged: Option<Box<dyn Model>> = None;
    let mut done = [0; 5];
    let mut live = Vec::new();
    for round in 0..1000 {
        let operation = rng.random_range(0..5);
        done[operation] += 1;
        let name = NAMES.choose(&mut rng).unwrap();
        match operation {
            0 => {
                let folder = folders.choose(&mut rng).unwrap();
                adapters.load(name, folder.path(), &base, &CPU).unwrap();
            }
            // The one in use goes on, whatever becomes of its name.
            1 => in_use = adapters.get(name).ok().cloned(),
            2 => drop(adapters.remove(name)),
            // Merging makes new weights; unmerging is to let them go.
            3 => {
                if let Ok(adapted) = adapters.get(name) {
                    merged = Some(whole(&base, &adapted.merged(&base).unwrap()));
                }
            }
            _ => merged = None,
        }
        let none = || Arc::new(Adapted::none(&CPU).unwrap());
        let (model, adapted): (&dyn Model, _) = match (&merged, &in_use) {
            (Some(merged), _) => (&**merged, none()),
            (None, Some(adapted)) => (&base, adapted.clone()),
            (None, None) => (&base, none()),
        };
        let batch = model.batch(&adapted, &Texts::new(&[1, 2, 3, 4], &[1, 3])).unwrap();
        model.logits(&adapted, &batch).unwrap();
        let of: Vec<Option<&str>> = adapters.names().map(Some).chain([None]).collect();
        let mixed = adapters.mixed(&of, &base, &CPU).unwrap();
        let tokens = vec![7; of.len()];
        let batch = base.batch(&mixed, &Texts::new(&tokens, &vec![1; of.len()])).unwrap();
        base.logits(&mixed, &batch).unwrap();
        drop((batch, mixed, adapted));

        if round % 100 == 99 {
            assert_eq!(bits(&base), before, "after {} operations the base has other bits", round + 1);
            (adapters, in_use, merged) = (Adapters::new(), None, None);
            release_idle_memory();
            live.push(heap_stats().live);
        }
    }
    assert!(done.iter().all(|&n| n > 150), "{done:?}");
    // The first hundreds fill caches of threads.
    let (first, last) = (live[4], live[9]);
    // An adapter that stayed would be two thousand bytes for each that was loaded.
    assert!(last.abs_diff(first) < 2000, "{live:?} bytes in use after every hundred operations");
}
