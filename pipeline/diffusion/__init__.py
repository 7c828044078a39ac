"""The mathematics of diffusion in latent space: torch only, no models, no files, no configuration objects.

Shapes: latents and noise [b, c, h, w] in the normalised space (zero mean, unit variance per channel), times [b]
in [0, 1] with t = 1 pure noise, row ids int64 [b, 2]::

    rng          (seed, row id, purpose, counter)  ->  uniform or normal numbers, one row's own   [b, ...]
    objectives   uniform numbers                   ->  training times t of a density              [b]
                 x0, noise, t                      ->  x_t, target, loss weight                   [b, c, h, w], [b]
                 prediction, x_t, t                ->  x0, noise, velocity                        [b, c, h, w]
    samplers     noise + any predict(x, t, **cond) ->  latents                                    [b, c, h, w]

A training step draws noise (purpose "noise"), time ("time") and the dropout of conditions ("label"; where there are
labels and texts "label", "text" and "joint") for each row by its id and epoch, so the numbers are the same on one
worker and on eight, and the same again after a restart. Sampling draws its noise by the request's id in the same way.

Nothing here has state: a crash leaves nothing behind, and every function can be called again. `solvers`
(names, objectives, costs, combinations of conditions) and `config` (the pydantic models of the choices) import no
torch.
"""
