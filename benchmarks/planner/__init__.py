"""Plans of a training on several GPUs: memory, traffic and time under each layout. README.md has the formulas.

`plan` is the command, `formulas` computes, `footprint` counts a model, `machine` knows GPUs. `simulation` draws the
figure of README.md, and `measured` holds plans beside steps of this machine.
"""
