//! One process alone.

use tch::Tensor;

use crate::communicator::{Message, check_peer, check_root};
use crate::stderr::say;
use crate::{AbortHandle, Communicator, Result, host};

/// A group of one rank: every collective is the identity.
#[derive(Debug, Clone, Copy, Default)]
pub struct SingleProcess;

impl Communicator for SingleProcess {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<()> {
        host::check_reduction("all_reduce_sum", tensor)
    }

    fn all_reduce_max(&self, tensor: &mut Tensor) -> Result<()> {
        host::check_reduction("all_reduce_max", tensor)
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        check_root("broadcast", root, 1)?;
        host::check_writable("broadcast", tensor)
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        host::gathered("all_gather", tensor, |host| Ok(host.copy()))
    }

    fn broadcast_bytes(&self, _: &mut Vec<u8>, root: usize) -> Result<()> {
        check_root("broadcast_bytes", root, 1)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }

    fn wait_for_all(&self) -> Result<()> {
        Ok(())
    }

    fn send(&self, to: usize, _: Message) -> Result<()> {
        check_peer("send", 0, to, 1)
    }

    fn try_receive(&self, from: usize) -> Result<Option<Message>> {
        check_peer("receive", 0, from, 1).map(|()| None)
    }

    fn split(&self, _: usize, _: usize) -> Result<Box<dyn Communicator>> {
        Ok(Box::new(Self))
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle::new(|code, message| {
            say(message);
            std::process::exit(code);
        })
    }
}
