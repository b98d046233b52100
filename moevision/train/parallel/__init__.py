"""Expert and sharded parallelism: `fit --parallel fsdp|ddp --parallel.expert N`; nothing else imports this folder.

Read `layout` (which process holds what, and how tokens reach their experts), `parts` (norms, clipping,
optimizers, copies and checkpoints of divided tensors), `strategy` (Lightning's side).
"""
