"""Settings with which every registered method is tested: learning rates and options, by method and variant."""

from __future__ import annotations

# name -> (learning rate for the quadratic, learning rate for logistic regression, other settings)
SETTINGS = {
    "adamw": (0.03, 0.03, {}),
    "conmezo": (0.04, 0.4, {"num_perturbations": 2, "angle": 1.35, "beta": 0.9}),
    "eggroll": (0.04, 0.05, {"num_perturbations": 4}),
    "es": (0.04, 0.05, {"num_perturbations": 4}),
    "fzoo": (0.05, 0.05, {"eps": 1e-3}),
    "forward_difference": (0.05, 0.5, {"num_perturbations": 2}),
    "forward_gradient": (0.05, 0.5, {"num_perturbations": 2}),
    # Of a loss of one number there is one example, whose slope has no spread to be divided by.
    "grzo": (0.05, 0.5, {"num_perturbations": 2, "whiten": False}),
    "hizoo": (0.05, 0.5, {"num_perturbations": 2, "hessian_smooth": 1e-3}),
    "kerzoo": (0.008, 0.1, {"averaging": "journal"}),
    "lozo": (0.04, 0.4, {"num_perturbations": 2, "rank": 1, "refresh": 5}),
    "lozo_m": (0.04, 0.4, {"num_perturbations": 2, "rank": 1, "refresh": 5, "momentum": 0.5}),
    "mezo": (0.05, 0.5, {"num_perturbations": 2}),
    "qzo": (0.05, 0.5, {"num_perturbations": 2}),
    "r_adazo": (0.02, 0.02, {"num_perturbations": 4}),
    "richardson": (0.05, 0.5, {"num_perturbations": 2}),
    "rloo": (0.05, 0.5, {"num_perturbations": 4}),
    "sgd": (0.05, 0.5, {}),
    "sparse_mezo": (0.05, 0.5, {"num_perturbations": 2, "density": 1.0}),
    "spsa_1_5": (0.05, 0.5, {"num_perturbations": 2}),
    "subzero": (0.03, 0.4, {"num_perturbations": 2, "rank": 1, "refresh": 5}),
    "subzero_plus": (0.02, 0.03, {"num_perturbations": 4, "rank": 2, "refresh": 10}),
    "zeroth_order": (0.05, 0.5, {"estimator": "two_point(1e-3, 2)"}),
    "zo_adam": (0.05, 0.03, {"num_perturbations": 4}),
    "zo_adamm": (0.05, 0.03, {"num_perturbations": 4}),
    "zo_muon": (0.05, 0.4, {"num_perturbations": 4, "rank": 2, "refresh": 5, "vector_scale": 1.0}),
    "zo_sign": (0.02, 0.01, {"num_perturbations": 4}),
}
# More variants of the methods that have several updates; they keep the same promises.
VARIANTS = {
    "mezo_momentum": ("mezo", (0.01, 0.1, {"num_perturbations": 2, "momentum": 0.8})),
    "forward_difference_normalized": (
        "forward_difference",
        (0.02, 0.1, {"num_perturbations": 2, "normalize": True}),
    ),
    "forward_difference_polyak": (
        "forward_difference",
        (0.02, 0.1, {"num_perturbations": 2, "normalize": True, "polyak_share": 0.5}),
    ),
    "es_leave_one_out": ("es", (0.05, 0.5, {"num_perturbations": 4, "shaping": "leave_one_out", "antithetic": False})),
    "es_ranks": ("es", (0.14, 0.1, {"num_perturbations": 4, "shaping": "centred_ranks"})),
    "kerzoo_md_int8": ("kerzoo_printed", (0.005, 0.1, {"averaging": "int8", "grad_at": "md"})),
    "kerzoo_clip": ("kerzoo_printed", (0.008, 0.1, {"averaging": "fp32", "clip": "param_init", "clip_radius": 50.0})),
    "low_rank_one_sided_adam": (
        "zeroth_order",
        (
            0.05,
            0.03,
            {"directions": "low_rank(1, refresh=5)", "estimator": "one_sided(1e-3, 4)", "update": "adam"},
        ),
    ),
    "normalized_momentum": (
        "zeroth_order",
        (0.006, 0.02, {"estimator": "two_point(1e-3, 2)", "update": "normalized(0.9) + sgd(0.8)"}),
    ),
    "zo_sign_projection": ("zo_sign", (0.03, 0.02, {"num_perturbations": 4, "sign_of": "projection"})),
}
CASES = {name: (name, settings) for name, settings in SETTINGS.items()} | VARIANTS
