"""Networks that predict noise, velocity or v from noisy latents, behind one calling convention, and what they are.

    forward(x_BCHW, t_B, labels_B=None, text_BLD=None, text_mask_BL=None) -> prediction_BCHW

A published class takes what its pipeline gives it besides: pooled_BP, sizes_B6, guidance_B (`adapters.Published`).
x is normalised latents plus noise, t in [0, 1] with 1 pure noise; label index num_classes means "no label" and is
the model's `null_label`. Nothing is dropped inside: the trainer drops labels and text per row, by the row's id.

    config    ModelConfig, a union on `kind`: sizes, and what each learns from  (pydantic only)
    info      ModelInfo, the one description of a model: all that a sampler must know, also of a published pipeline
              (no torch)
    checkpoints  which checkpoints of a run are complete, and their files, checked
    read      export, checkpoint or published pipeline  ->  StoredModel: ModelInfo, digest, hashes  (no torch);
              of these, or a network of diffusers alone  ->  InitialWeights, which a run starts from
    load      ModelConfig + what the dataset is   ->  nn.Module  (dit.py, adapters.py around a diffusers class, or a
              network of an installed package); low-rank adapters in it; what `read` reads  ->  nn.Module + ModelInfo,
              or a network filled

`train.export` writes exports: safetensors, JSON, a model card. One is complete when its latentloom.json is there;
that file is written last, so a crash leaves a directory that reads as "no export" and is written over by the next
attempt. A complete export is never changed. Loading runs no code from the directory: JSON and safetensors, classes
from a closed list or an installed package, hashes checked.
"""
