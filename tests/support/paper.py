"""The constants of the paper (section 4.2, Tables 6 to 8) and, where the paper gives none, of the released code.

This is the only place of the tests that states them; configs/pais.yaml and the defaults of PAIS are compared with it.
"""

COMMON = {
    "method.alpha": 4.0,  # Table 6
    "method.beta": 4.0,  # Table 6
    "method.tau_cls": 0.35,  # Table 7
    "method.tau_iou": 0.30,  # Table 8
    "method.ema": 0.999,
    "method.burn_in": 0,
    "method.lambda_labeled": 1.0,
    "method.normalizer": "pos_neg",  # Eq. 5
    "method.class_scale": 1.0,  # Eq. 5 has none of these four factors
    "method.class_cap": 1.0,
    "method.mask_scale": 1.0,
    "method.negative_weight": 1.0,
    "method.unlabeled_weights.mask_iou": 0.0,
    "method.unlabeled_weights.semantic": 0.0,
    "batch.labeled": 1,
    "batch.unlabeled": 3,
    "optim.reference.batch": 16,
    "optim.reference.steps": 220_000,
    "optim.reference.warmup": 1000,  # released code
    "optim.reference.milestones": "[160000, 200000]",  # released code
    "segmentor.backbone": "resnet50",
}
PAPER = {  # segmentor -> dotted setting -> value, as in ``flatten``
    "mask_rcnn": {
        **COMMON,
        "method.lambda_unlabeled": 1.5,
        "optim.name": "sgd",
        "optim.reference.lr": 0.01,
    },
    "knet": {
        **COMMON,
        "method.lambda_unlabeled": 0.3,
        "optim.name": "adamw",
        "optim.reference.lr": 1e-4,
        "optim.weight_decay": 0.05,  # released code
        "optim.backbone_lr_factor": 0.25,  # released code
        "optim.clip_norm": 1.0,  # released code
        "segmentor.num_kernels": 100,
        "segmentor.stages": 3,
    },
}
