//! One residual half of a layer, forward and backward.
//!
//! The graph of a whole step is never built. Forward runs half-block by half-block without a graph
//! and keeps each one's input; backward builds the graph of one half-block at a time, from its
//! input anew ([`Keep::Input`], activation checkpointing) or as forward left it ([`Keep::Graph`]).
//! Both give the same gradients to the bit.
//!
//! The same cut is where tensor parallelism communicates: every rank computes its partial sum of
//! the half-block, forward adds these up, and backward adds up the gradients of the input.
//!
//! Legend: `T` tokens of the micro-batch, `C` hidden_size, `H`/`KV` query and K/V heads, `D`
//! head_dim.

use dromedary_llama::{
    RotaryAt,
    block::{self, Layer},
};
use dromedary_parallel::Communicator;
use tch::{Tensor, no_grad};

use crate::error::Result;

/// Which half of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// `x + o_proj(attention(input_layernorm(x)))`
    Attention,
    /// `x + down_proj(silu(gate_proj(n)) * up_proj(n))`, `n = post_attention_layernorm(x)`
    Mlp,
}

/// What forward leaves behind for backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The input alone: half of the memory or less, and the half-block is computed twice.
    Input,
    /// The whole graph.
    Graph,
}

/// A half-block's input (T, C), and its partial sum (T, C) where the graph was kept.
#[derive(Debug)]
pub struct Saved {
    input: Tensor,
    partial: Option<Tensor>,
}

/// One half of `layer`, over the rows of one micro-batch.
pub struct HalfBlock<'a> {
    /// The layer with its adapters.
    pub layer: &'a Layer,
    /// Which half of it.
    pub half: Half,
    /// Rotation of each of the T positions.
    pub rotary_at: &'a RotaryAt,
    /// Length of each row; they sum to T.
    pub lengths: &'a [i64],
}

impl HalfBlock<'_> {
    /// This rank's part of what the half-block adds to its input: (T, C) -> (T, C).
    fn partial(&self, x: &Tensor) -> Result<Tensor> {
        match self.half {
            Half::Attention => {
                let mut attend = |q: &Tensor, k: &Tensor, v: &Tensor| {
                    block::causal_attention(&self.layer.heads, q, k, v, self.lengths)
                };
                Ok(block::attention_partial(self.layer, x, self.rotary_at, &mut attend)?)
            }
            Half::Mlp => Ok(block::mlp_partial(self.layer, x)?),
        }
    }

    /// `y = x + sum of all ranks' partial sums`, (T, C) -> (T, C), without a graph for the caller.
    /// Every rank of `comm` must call this with the same `x`; all get the same `y`.
    ///
    /// # Errors
    /// If a rank fails in the collective, or memory runs out.
    pub fn forward(
        &self,
        x: &Tensor,
        keep: Keep,
        comm: &dyn Communicator,
    ) -> Result<(Tensor, Saved)> {
        let (saved, partial) = match keep {
            Keep::Input => {
                let partial = no_grad(|| self.partial(x))?;
                (Saved { input: x.shallow_clone(), partial: None }, partial)
            }
            Keep::Graph => {
                let input = x.detach().set_requires_grad(true);
                let partial = self.partial(&input)?;
                // The all-reduce works in place, and backward may need what is in there.
                let sum = partial.detach().copy();
                (Saved { input, partial: Some(partial) }, sum)
            }
        };
        let mut sum = partial;
        comm.all_reduce_sum(&mut sum)?;
        Ok((no_grad(|| x + sum), saved))
    }

    /// Gradients of the half-block's input (T, C) and of `trained`, given that of its output.
    /// Every rank of `comm` must call this; all get the same gradient of the input.
    ///
    /// # Errors
    /// If a rank fails in the collective, or memory runs out.
    pub fn backward(
        &self,
        saved: Saved,
        grad_output: &Tensor,
        trained: &[&Tensor],
        comm: &dyn Communicator,
    ) -> Result<(Tensor, Vec<Option<Tensor>>)> {
        let (input, partial) = match saved.partial {
            Some(partial) => (saved.input, partial),
            None => {
                let input = saved.input.detach().set_requires_grad(true);
                let partial = self.partial(&input)?;
                (input, partial)
            }
        };
        let mut inputs = vec![&input];
        inputs.extend(trained);
        let mut gradients =
            dromedary_torch_ext::run_backward(&[&partial], &[grad_output], &inputs, false)?;
        let trained_gradients = gradients.split_off(1);
        let grad_input = match gradients.pop().flatten() {
            Some(mut through) => {
                comm.all_reduce_sum(&mut through)?;
                no_grad(|| grad_output + through)
            }
            None => grad_output.shallow_clone(),
        };
        Ok((grad_input, trained_gradients))
    }
}
