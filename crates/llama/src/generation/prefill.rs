//! Reading the prompts of several rows at once.

// Shapes: T = tokens of all prompts, C = hidden_size.

use dromedary_parallel::Communicator;
use tch::Tensor;

use crate::{
    Llama, Result,
    kv_cache::{LayerStep, SharedPrefix, SlotCache, Step, StepRow},
};

/// A row's tokens behind its part of the prefix.
pub(super) struct Prompt<'p> {
    pub(super) slot: usize,
    /// Tokens of the prefix that it sees.
    pub(super) prefix: usize,
    /// Tokens of the prefix that its slot holds a copy of.
    pub(super) copied: usize,
    pub(super) tokens: &'p [u32],
}

/// The hidden states of all tokens, before the final norm; their keys and values go to the slots.
///
/// # Shapes
/// result: `(T, C)`, the prompts one behind the other.
pub(super) fn read_prompts(
    model: &Llama,
    comm: &dyn Communicator,
    cache: &mut SlotCache,
    prefix: Option<&SharedPrefix>,
    prompts: &[Prompt<'_>],
) -> Result<Tensor> {
    let (mut ids, mut positions, mut steps) = (Vec::new(), Vec::new(), Vec::new());
    for &Prompt { slot, prefix, copied, tokens } in prompts {
        ids.extend_from_slice(tokens);
        positions.extend((prefix + copied..).take(tokens.len()).map(|at| at as i64));
        steps.push(StepRow {
            slot: slot as i64,
            new: tokens.len() as i64,
            length: (copied + tokens.len()) as i64,
            prefix: prefix as i64,
        });
    }
    let heads = model.heads();
    let mut step = Step::prefill(cache, heads, model.device(), &steps, prefix);
    let x = model.embed(&ids)?; // (T, C)
    model.forward_layers(x, &positions, comm, &mut |layer, q, k, v| {
        step.attend(cache, LayerStep { layer, heads, prefix, q, k, v })
    })
}
