use lora_core::{Params, Tensor};
use lora_kernels::cuda::Graph;

use crate::{KvCache, Result};

/// The forward pass of one more token for every sequence, recorded on a CUDA device: it is hundreds of small kernels, and
/// starting them one by one takes longer than they do.
///
/// The first such pass runs as it is (kernels are compiled, the fastest are chosen), the second is recorded, and from then
/// on the recording is run for as long as nothing that it depends on changes. `LORA_CUDA_GRAPHS=0` turns it off.
#[derive(Default)]
pub(crate) enum Recorded {
    /// Nothing was run yet that could be recorded.
    #[default]
    None,
    /// A pass with this key was run as it is.
    Seen(Key),
    /// The recording, and where it leaves the logits.
    Ready(Key, Graph, Tensor),
    /// The device cannot record.
    Never,
}

/// What a recording depends on besides the inputs that it reads anew.
pub(crate) struct Key {
    /// Held, so that nobody changes the values in place.
    params: Params,
    /// The model's, which is never written.
    head: Tensor,
    rows: u64,
}

impl Key {
    fn same(&self, other: &Key) -> bool {
        self.rows == other.rows && self.params.same_memory(&other.params) && self.head.same_memory(&other.head)
    }
}

impl Recorded {
    /// The cache's memory has moved.
    pub(crate) fn forget(&mut self) {
        if !matches!(self, Recorded::Never) {
            *self = Recorded::None;
        }
    }
}

/// The logits of the forward pass `work` over a cache, with these parameters and this head.
pub(crate) fn run(
    cache: &mut KvCache,
    params: &Params,
    head: &Tensor,
    work: impl Fn(&mut KvCache) -> Result<Tensor>,
) -> Result<Tensor> {
    let recordable = !head.device().is_cpu() && std::env::var_os("LORA_CUDA_GRAPHS").is_none_or(|v| v != "0");
    let Some(rows) = cache.rows_shape().filter(|_| recordable) else { return work(cache) };
    let key = Key { params: params.clone(), head: head.clone(), rows };
    match std::mem::take(&mut cache.recorded) {
        Recorded::Never => {
            cache.recorded = Recorded::Never;
            work(cache)
        }
        Recorded::Ready(old, graph, logits) if old.same(&key) => {
            graph.launch()?;
            let copy = copied(&logits);
            cache.recorded = Recorded::Ready(old, graph, logits);
            copy
        }
        Recorded::Seen(old) if old.same(&key) => match Graph::record(&head.device(), || work(cache)) {
            Ok((logits, graph)) => {
                graph.launch()?;
                let copy = copied(&logits);
                cache.recorded = Recorded::Ready(key, graph, logits);
                copy
            }
            Err(e) => {
                tracing::warn!("the device records no graphs, so tokens take longer: {e}");
                cache.recorded = Recorded::Never;
                work(cache)
            }
        },
        _ => {
            cache.recorded = Recorded::Seen(key);
            work(cache)
        }
    }
}

/// The logits in memory of their own: the next run of the recording overwrites the others.
fn copied(logits: &Tensor) -> Result<Tensor> {
    let mut copy = logits.clone();
    copy.make_mut()?;
    Ok(copy)
}
