//! One residual half of a layer, forward and backward.
//!
//! The graph of a whole step is never built. Forward runs half-block by half-block without a graph
//! and keeps each one's input; backward builds the graph of one half-block at a time, from its
//! input anew ([`Keep::Input`], activation checkpointing) or as forward left it ([`Keep::Graph`]).
//! Both give the same gradients to the bit. In f32 on a CPU [`ClosedForm`] stands in for graphs, with
//! kernels of its own.
//!
//! The same cut is where tensor parallelism communicates: every rank computes its partial sum of
//! the half-block, forward adds these up, and backward adds up the gradients of the input.
//!
//! Legend: `T` tokens of the micro-batch, `C` hidden_size, `H`/`KV` query and K/V heads, `D`
//! head_dim.

use dromedary_llama::{
    AttentionState, ClosedForm, HalfGradients, LayerPass, Llama, MlpState, RotaryAt,
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

/// A half-block's input (T, C), and what else forward left for backward.
#[derive(Debug)]
pub struct Saved {
    input: Tensor,
    left: Left,
}

#[derive(Debug)]
enum Left {
    Nothing,
    /// The partial sum (T, C) with its graph.
    Graph(Tensor),
    Attention(AttentionState),
    Mlp(MlpState),
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
    /// What computes it; autograd, where there is none.
    pub closed_form: Option<&'a ClosedForm>,
}

impl<'a> HalfBlock<'a> {
    /// Both halves of each layer over the rows of one micro-batch, in the order of forward.
    pub(crate) fn of_layers(
        model: &'a Llama,
        rotary_at: &'a RotaryAt,
        lengths: &'a [i64],
        closed_form: Option<&'a ClosedForm>,
    ) -> Vec<Self> {
        let halves = |layer| {
            let half_block = |half| Self { layer, half, rotary_at, lengths, closed_form };
            [Half::Attention, Half::Mlp].map(half_block)
        };
        model.layers().iter().flat_map(halves).collect()
    }

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
        let (saved, mut sum) = match self.closed_form {
            Some(form) => no_grad(|| self.closed_form(form, x, keep))?,
            None => self.with_graph(x, keep)?,
        };
        comm.all_reduce_sum(&mut sum)?;
        let _ = no_grad(|| sum.g_add_(x));
        Ok((sum, saved))
    }

    /// The partial sum, in closed form.
    fn closed_form(&self, form: &ClosedForm, x: &Tensor, keep: Keep) -> Result<(Saved, Tensor)> {
        let (partial, left) = match self.half {
            Half::Attention => {
                let (partial, state) = form.attention(self.pass(), x)?;
                (partial, Left::Attention(state))
            }
            Half::Mlp => {
                let (partial, state) = form.mlp(self.layer, x)?;
                (partial, Left::Mlp(state))
            }
        };
        let left = if keep == Keep::Graph { left } else { Left::Nothing };
        Ok((Saved { input: x.shallow_clone(), left }, partial))
    }

    /// The partial sum, without a graph for the caller.
    fn with_graph(&self, x: &Tensor, keep: Keep) -> Result<(Saved, Tensor)> {
        match keep {
            Keep::Input => {
                let partial = no_grad(|| self.partial(x))?;
                Ok((Saved { input: x.shallow_clone(), left: Left::Nothing }, partial))
            }
            Keep::Graph => {
                let input = x.detach().set_requires_grad(true);
                let partial = self.partial(&input)?;
                // The all-reduce works in place, and backward may need what is in there.
                let sum = partial.detach().copy();
                Ok((Saved { input, left: Left::Graph(partial) }, sum))
            }
        }
    }

    fn pass(&self) -> LayerPass<'_> {
        LayerPass { layer: self.layer, rotary_at: self.rotary_at, lengths: self.lengths }
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
        let (through, of_trained) = match self.closed_form {
            Some(form) => {
                let gradients = no_grad(|| self.closed_form_backward(form, saved, grad_output))?;
                let HalfGradients { input, trained } = gradients;
                (Some(input), trained.into_iter().map(Some).collect())
            }
            None => self.graph_backward(saved, grad_output, trained)?,
        };
        let grad_input = match through {
            Some(mut through) => {
                comm.all_reduce_sum(&mut through)?;
                let _ = no_grad(|| through.g_add_(grad_output));
                through
            }
            None => grad_output.shallow_clone(),
        };
        Ok((grad_input, of_trained))
    }

    fn closed_form_backward(
        &self,
        form: &ClosedForm,
        Saved { input, left }: Saved,
        grad_output: &Tensor,
    ) -> Result<HalfGradients> {
        Ok(match (self.half, left) {
            (Half::Attention, Left::Attention(state)) => {
                form.attention_backward(self.pass(), &input, Some(state), grad_output)?
            }
            (Half::Attention, _) => {
                form.attention_backward(self.pass(), &input, None, grad_output)?
            }
            (Half::Mlp, Left::Mlp(state)) => {
                form.mlp_backward(self.layer, &input, Some(state), grad_output)?
            }
            (Half::Mlp, _) => form.mlp_backward(self.layer, &input, None, grad_output)?,
        })
    }

    /// Gradients of the input, not counting the residual, and of `trained`.
    fn graph_backward(
        &self,
        Saved { input, left }: Saved,
        grad_output: &Tensor,
        trained: &[&Tensor],
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
        let (input, partial) = match left {
            Left::Graph(partial) => (input, partial),
            _ => {
                let input = input.detach().set_requires_grad(true);
                let partial = self.partial(&input)?;
                (input, partial)
            }
        };
        let mut inputs = vec![&input];
        inputs.extend(trained);
        let mut gradients =
            dromedary_torch_ext::run_backward(&[&partial], &[grad_output], &inputs, false)?;
        let trained_gradients = gradients.split_off(1);
        Ok((gradients.pop().flatten(), trained_gradients))
    }
}
