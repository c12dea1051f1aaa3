"""What verl lacks to run on a CPU: a platform, and a rollout that generates without vLLM. Both are extension points of verl's.

`VERL_USE_EXTERNAL_MODULES=verl_cpu VERL_PLATFORM=cpu` loads it in every process of verl's.
"""

import asyncio
import functools
import types
from collections import Counter
from contextlib import contextmanager

import ray
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.utils import distributed
from verl.workers.rollout import base, replica

# verl asks the device for its memory, too.
CPU = types.ModuleType("cpu")
vars(CPU).update(vars(torch.cpu))
CPU.max_memory_allocated = CPU.max_memory_reserved = CPU.memory_allocated = CPU.memory_reserved = lambda *_: 0
CPU.mem_get_info = lambda *_: (0, 0)
CPU.empty_cache = CPU.ipc_collect = lambda: None
CPU.get_device_name = lambda *_: "CPU"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = CPU

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"  # verl counts these; a cluster may have them by declaration

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


@ray.remote
class Server:
    """Generates one request after the other with transformers."""

    def __init__(self, path):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.steps = 0
        self.counts = Counter()

    def load(self, weights, steps):
        self.model.load_state_dict(weights)
        self.steps = steps

    async def generate(self, request_id, prompt_ids, sampling_params, image_data=None, video_data=None, **_):
        # The completions of a group differ, and those of two runs do not.
        self.counts[tuple(prompt_ids)] += 1
        torch.manual_seed(hash((self.steps, self.counts[tuple(prompt_ids)], *prompt_ids)))
        row = self.model.generate(torch.tensor([prompt_ids]), max_new_tokens=24, do_sample=True, suppress_tokens=[0, 1, 3, 4])
        row = row[0, len(prompt_ids) :].tolist()
        return replica.TokenOutput(token_ids=row, stop_reason="completed", extra_fields={"global_steps": self.steps})

    async def wake_up(self):
        pass

    async def sleep(self):
        pass


class Replica(replica.RolloutReplica):
    async def launch_servers(self):
        self._server_handle = Server.options(name=f"tiny_server_{self.replica_rank}").remote(self.model_config.path)
        self._server_address = f"tiny-{self.replica_rank}"
        self.servers = [self._server_handle]


class Rollout(base.BaseRollout):
    """Lives with a rank of the trained model and hands its weights to a server."""

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, **_):
        held = {name: weight.float() for name, weight in weights}
        server = ray.get_actor(f"tiny_server_{torch.distributed.get_rank()}")
        await asyncio.wrap_future(server.load.remote(held, global_steps).future())


# verl asks for a backend of the CPU and one of the device, which here are the same.
distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)
replica.RolloutReplicaRegistry.register("tiny", lambda: Replica)
base._ROLLOUT_REGISTRY["tiny", "async"] = f"{__name__}.Rollout"
