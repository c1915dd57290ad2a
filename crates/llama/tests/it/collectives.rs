//! What a split model exchanges, counted: two all-reduces a layer, and how its weights are arranged for
//! that.

// Shapes: T = tokens, C = hidden_size, W = a rank's rows of the vocabulary.

use std::{cell::RefCell, ops::Range};

use dromedary_llama::{Linear, LoadOptions, generation::EngineConfig};
use dromedary_parallel::{AbortHandle, Communicator, Message, Result};
use tch::Tensor;

use crate::support::{self, Loaded, load, on_ranks, request, stories};

/// Writes down every call before it passes it on.
pub(crate) struct Counting {
    inner: Box<dyn Communicator>,
    calls: RefCell<Vec<(&'static str, Vec<i64>)>>,
}

impl Counting {
    pub(crate) fn new(group: &dyn Communicator) -> Self {
        let inner = group.split(0, group.rank()).unwrap();
        Self { inner, calls: RefCell::default() }
    }

    fn note(&self, call: &'static str, size: Vec<i64>) {
        self.calls.borrow_mut().push((call, size));
    }

    /// Numbers of the tensors that went through these calls.
    pub(crate) fn sizes_of(&self, calls: &[&str]) -> Vec<i64> {
        let made = self.calls.borrow();
        let of_these = made.iter().filter(|(call, _)| calls.contains(call));
        of_these.map(|(_, size)| size.iter().product()).collect()
    }

    /// All-reduces of residual streams, which are (T, C).
    fn all_reduces(&self, hidden_size: i64) -> usize {
        let of_stream = |(call, size): &&(&'static str, Vec<i64>)| {
            *call == "all_reduce_sum" && size.len() == 2 && size[1] == hidden_size
        };
        self.calls.borrow().iter().filter(of_stream).count()
    }
}

impl Communicator for Counting {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()> {
        self.note("all_reduce_sum", tensor.size());
        self.inner.all_reduce_sum(tensor)
    }

    fn all_reduce_max(&self, tensor: &mut Tensor) -> Result<()> {
        self.note("all_reduce_max", tensor.size());
        self.inner.all_reduce_max(tensor)
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        self.note("broadcast", tensor.size());
        self.inner.broadcast(tensor, root)
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        self.note("all_gather", tensor.size());
        self.inner.all_gather(tensor)
    }

    fn broadcast_bytes(&self, bytes: &mut Vec<u8>, root: usize) -> Result<()> {
        self.note("broadcast_bytes", Vec::new());
        self.inner.broadcast_bytes(bytes, root)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.note("all_gather_bytes", Vec::new());
        self.inner.all_gather_bytes(bytes)
    }

    fn barrier(&self) -> Result<()> {
        self.note("barrier", Vec::new());
        self.inner.barrier()
    }

    fn wait_for_all(&self) -> Result<()> {
        self.note("wait_for_all", Vec::new());
        self.inner.wait_for_all()
    }

    fn send(&self, to: usize, message: Message) -> Result<()> {
        self.inner.send(to, message)
    }

    fn try_receive(&self, from: usize) -> Result<Option<Message>> {
        self.inner.try_receive(from)
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>> {
        self.note("split", Vec::new());
        self.inner.split(color, key)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}

#[test]
fn a_forward_pass_costs_two_all_reduces_a_layer() {
    for tp in [2, 3] {
        on_ranks(tp, |comm| {
            let comm = Counting::new(comm);
            let options = LoadOptions { tp_rank: comm.rank(), tp, ..LoadOptions::default() };
            let model = load(&stories(), &options);
            let (layers, hidden) = (model.layers().len(), model.config().hidden_size);
            let _ = model.forward_logits(&[1, 5, 9, 44], &comm).unwrap();
            // The embedding is replicated: nothing comes before the first layer. The head's parts are
            // gathered at the end.
            let rows = &model.rank_plan().vocab;
            let mut want = vec![("all_reduce_sum", vec![4, hidden]); 2 * layers];
            want.push(("all_gather", vec![4 * (rows.end - rows.start)]));
            assert_eq!(*comm.calls.borrow(), want);
        });
    }
}

#[test]
fn a_decode_step_costs_two_all_reduces_a_layer() {
    on_ranks(3, |comm| {
        let comm = Counting::new(comm);
        let loaded = Loaded::new(&stories(), &comm);
        let hidden = loaded.model.config().hidden_size;
        // How the prompt is read is not counted here: it is the same for both lengths.
        let run = |max_gen_len| {
            let before = comm.all_reduces(hidden);
            let config = EngineConfig { max_gen_len, max_batch_size: 2, ..EngineConfig::default() };
            let mut engine = loaded.engine(&comm, config);
            let rows = (0..2).map(|row| request(format!("{row}"), vec![1, 403, 20 + row]));
            let steps = support::run(&mut engine, rows.collect()).statistics.decode_steps;
            (steps as usize, comm.all_reduces(hidden) - before)
        };
        let ((few, some), (many, more)) = (run(3), run(11));
        assert_eq!(many - few, 8);
        assert_eq!(more - some, 8 * 2 * loaded.model.layers().len());
    });
}

#[test]
fn projections_are_fused_and_the_head_is_split_by_rows() {
    let whole = load(&stories(), &LoadOptions::default());
    let ids = [0, 1, 300, 511];
    for tp_rank in 0..3 {
        let model = load(&stories(), &LoadOptions { tp_rank, tp: 3, ..LoadOptions::default() });
        let plan = model.rank_plan();
        let width = |range: &Range<i64>| range.end - range.start;
        let parts = |linear: &Linear| -> Vec<(&'static str, Range<i64>)> {
            linear.parts.iter().map(|part| (part.name, part.rows.clone())).collect()
        };
        for layer in model.layers() {
            let names = ["q_proj", "k_proj", "v_proj"];
            let want: Vec<_> = names.into_iter().zip(plan.local_qkv_rows()).collect();
            assert_eq!(parts(&layer.qkv_proj), want);
            assert_eq!(layer.qkv_proj.weight.size(), (want[2].1.end, 64));
            let names = ["gate_proj", "up_proj"];
            let want: Vec<_> = names.into_iter().zip(plan.local_gate_up_rows()).collect();
            assert_eq!(parts(&layer.gate_up_proj), want);
            assert_eq!(layer.gate_up_proj.weight.size(), (2 * width(&plan.intermediate), 64));
            assert_eq!(layer.o_proj.weight.size(), (64, 8 * plan.n_local_heads()));
            assert_eq!(layer.down_proj.weight.size(), (64, width(&plan.intermediate)));
        }
        assert_eq!(model.lm_head().weight.size(), (width(&plan.vocab), 64));
        assert_eq!(model.embed(&ids).unwrap(), whole.embed(&ids).unwrap());
    }
}
