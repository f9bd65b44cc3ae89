"""A lost node in a local cluster of several nodes."""

import ray
from queries import choose
from ray.cluster_utils import Cluster

from fishermask.pool.ray_shards import RayShards
from fishermask.pool.shards import LocalShards

FAST = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}


def test_query_after_the_loss_of_a_node_gives_the_same_batch(trained):
    """A node that holds a shard ends during the picks, and a new one joins."""
    setup, model = trained
    undisturbed = choose("fisher_mask", LocalShards(setup.data.train.images, setup.statistics), setup, model)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": FAST}
    )
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        shards = RayShards(setup.data.train.images, setup.statistics, 2, 1, 0)

        def progress(stage, done, total):
            if (stage, done) == ("pick", 8):
                cluster.remove_node(nodes[0], allow_graceful=False)
                cluster.add_node(num_cpus=1)

        batch = choose("fisher_mask", shards, setup, model, progress=progress, close=False)
        assert batch == undisturbed
        assert shards.num_rebuilt >= 1
        shards.close()
    finally:
        ray.shutdown()
        cluster.shutdown()
