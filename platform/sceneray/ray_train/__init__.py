"""Training on a Ray cluster: Ray Train starts the workers and starts them again; `sceneray.training` does the rest.

The only part of the library that imports ray. Ray's own record of a run is thrown away: what a run goes on from is
decided by the checkpoints in RUN.

    driver.py     launch: worker groups one after the other, seen from the process that asked for the run
    worker.py     what each training process runs
    placement.py  what the cluster has, and what fits
"""

from sceneray.ray_train.driver import launch

__all__ = ["launch"]
