import sys; sys.path.insert(0,'/work/main/tests')
import time,warnings
import pytest
from pathlib import Path
from conftest import tiny_config
import tracked_replay as tr
def test_a(store):
    t=time.time(); r=tr.train(tiny_config()); print('train',time.time()-t)
    t=time.time(); r2=tr.train(tiny_config()); print('again',time.time()-t); assert r==r2
    t=time.time(); m=tr.magic(r,'0-2'); print('magic',time.time()-t)
    print(tr.load_scores(m).num_rows)
    from tracked_replay.tracking import ui_command
    print(ui_command(m))
    import mlflow
    print([a for a in mlflow.get_run(m).data.metrics], mlflow.get_run(m).data.tags, mlflow.get_run(r).data.metrics)
