"""Every field of a run, with the paper's value where it gives one. Other configs change a few.

The paper: Li et al., Your Negative May not Be True Negative, ACM MM 2023, arXiv 2308.04380.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()

    # Seed of the initial weights, the order of the data, augmentation and sampling.
    config.seed = 0
    # Passes over all (image, caption) pairs; may be fractional.
    config.num_epochs = 25.0
    # Pairs in a batch over all devices and processes.
    config.global_batch_size = 32
    # Parts in which a batch is encoded, one after the other, to save memory; the negatives are
    # still those of the whole batch.
    config.micro_batches = 1
    # Workdir of another run whose best weights this run starts from ("" for none).
    config.init_from = ""
    # Consecutive steps with a non-finite loss or gradient (all skipped) that end the run.
    config.max_bad_steps = 10
    # Cache of compiled programs; "" for none (nor with several CPU devices).
    config.compile_cache = "~/.cache/fne_jax/xla"

    config.mesh = mesh = ConfigDict()
    # Both axes shard batches, parameters, momentum parameters and Adam's moments. Two axes matter
    # only where the number of all devices divides no dimension of a large array, but that along one
    # axis does. Devices along the first; -1 for as many as `fsdp` leaves.
    mesh.data = -1
    # Devices along the second; -1 for as many as `data` leaves.
    mesh.fsdp = 1

    config.data = data = ConfigDict()
    # Where the pairs come from: one of the sources in fne_jax/data/sources/registry.py, e.g. coco,
    # csv or shapes. docs/data.md says what each expects in `dir`.
    data.source = "karpathy"
    # Folder of the source, local or remote (gs://...); of csv and jsonl also the table itself.
    data.dir = ""
    # Where val and test come from, as SOURCE:FOLDER, e.g. coco:/data/coco; "" for the source above.
    data.val = ""
    # The same of test.
    data.test = ""
    # The column of images in tables that hold them (`parquet`), or the feature (`tfds`).
    data.image_key = "image"
    # The column or the feature of captions, or their key in JSON beside images (`webdataset`);
    # several with commas between.
    data.caption_key = "caption"
    # Folder of prepared datasets, on a file system that is mounted here.
    data.cache_dir = "~/.cache/fne_jax"
    # Stored images whose shorter side is longer than this many pixels are shrunk to it, which makes
    # decoding cheaper; 0 stores images as they are.
    data.resize_to = 0
    # How many unusable images and captions may be skipped.
    data.max_skipped = 0
    # File of unlabelled matches in the training split: a detector's list (.npz of `audit
    # --matches`) or people's verdicts (.csv or .jsonl of `review --export`). After the warm-up they
    # are excluded from the negatives and from the statistics of negatives, and are further
    # positives of multi_positive and sigmoid, weighed by their probability (of verdicts 1). "" for
    # none.
    data.matches = ""
    # Least probability of a pair that is a positive; one from `matches_negative` up to it is merely
    # excluded.
    data.matches_positive = 0.0
    # Probability below which a pair of the file is a negative, like the pairs that are not in it.
    data.matches_negative = 0.0
    # File of verdicts (.csv or .jsonl of `review --export`): captions that most reviewers call no
    # match of their own image are in no batch. "" for none.
    data.refuted = ""
    # Training augmentation: none (as in evaluation), crop_flip (random resized crop and mirroring),
    # or randaugment (both, and RandAugment(2, 7), as in the paper).
    data.augmentation = "crop_flip"
    # Name of a Hugging Face tokenizer, a local folder, "train" to fit one to the captions, or
    # auto: that of the pretrained text tower, and "train" without one.
    data.tokenizer = "auto"
    # Largest vocabulary of a fitted tokenizer.
    data.vocab_size = 8000
    # How captions are cleaned before they are tokenized: authors (lower case, without most
    # punctuation, as in the authors' code), lower (lower case), none (they stay as they are), or
    # auto: authors for a text tower from random weights or an uncased one such as BERT's; none for
    # others (cased ones, CLIP, SigLIP, sentence-transformers), or lower if their settings say so.
    data.cleaning = "auto"
    # Words kept of a caption; 0 for 30 with the authors' cleaning, as theirs, and all otherwise.
    data.max_words = 0
    # Prepended to each caption, e.g. "query: " for E5; auto for the default prompt of
    # a pretrained text tower of sentence-transformers, and "" with others.
    data.prompt = "auto"
    # Number of tokens that a caption is padded or truncated to; 0 for that of the pretrained text
    # tower (CLIP 77, SigLIP 64), and with others 30, or their maximum if less.
    data.text_length = 0
    # Compute the outputs of the frozen layers once for each image and caption, and keep them in
    # `cache_dir`. Augmented images are not kept.
    data.keep_frozen = False
    # Batches prefetched.
    data.prefetch = 4

    # The rendered dataset. The density of false negatives falls as the vocabulary grows.
    data.shapes = shapes = ConfigDict()
    shapes.seed = 0  # of the scenes
    shapes.train_images = 10000  # images of the training split, five captions each
    shapes.val_images = 500  # images of the validation split
    shapes.test_images = 1000  # images of the test split
    shapes.shapes = 5  # 1 to 8 kinds of shape
    shapes.colours = 7  # 1 to 10 colours
    shapes.max_objects = 3  # objects in a scene, 1 to this many, at most 3
    # varied (one to seven facts per caption: some are true of far more images than others) or four
    # (four facts in every caption, three objects in every scene).
    shapes.facts = "varied"

    data.synthetic = synthetic = ConfigDict()
    synthetic.seed = 0  # of the pixels and the captions
    synthetic.images = 256  # images of each split, two captions each

    # Mean and standard deviation by channel, for pixels in [0, 1]; () for those of the pretrained
    # image tower: SigLIP's 0.5, and with others CLIP's, which the authors use with ViT too.
    config.image_mean = ()
    config.image_std = ()  # like image_mean

    config.encoder = encoder = ConfigDict()
    encoder.image = image = ConfigDict()
    # Hugging Face name or local folder of a pretrained model (docs/pretrained.md lists what is
    # supported); "" for random weights and the sizes below. The model's `image_size` may differ.
    image.pretrained = ""
    image.image_size = 384  # pixels of a side
    image.patch_size = 16  # pixels of a side of a patch, which is a token
    image.width = 768  # dimension of the tokens between layers
    image.layers = 12  # transformer layers
    image.heads = 12  # attention heads of a layer; they divide the width
    image.mlp_width = 3072  # hidden dimension of each layer's MLP
    image.dropout = 0.0  # share of activations dropped while training
    # mean over all tokens, class token included; first (the class token); first_and_mean (the class
    # token and the mean of the others, concatenated); checkpoint (the embedding of CLIP and SigLIP
    # themselves); or auto (checkpoint where there is one, else mean).
    image.pooling = "auto"
    # How many of the last layers are pooled and concatenated; DINOv2's linear evaluation uses 4.
    image.pooled_layers = 1
    # Frozen layers from the bottom, embeddings included: "none", "all" (with the final norm and the
    # head), or a number, e.g. "6". They have no gradient, no moments, no momentum copy and no
    # dropout, and run once per step.
    image.frozen_layers = "none"
    # Rank of low-rank updates of the layers' matrices (LoRA), with the rest of the tower frozen; 0
    # for none.
    image.lora_rank = 0
    encoder.text = text = ConfigDict()
    # As above, or of a folder of sentence-transformers.
    text.pretrained = ""
    text.max_length = 512  # position embeddings, the most tokens of a caption
    text.width = 768  # dimension of the tokens between layers
    text.layers = 12  # transformer layers
    text.heads = 12  # attention heads of a layer; they divide the width
    text.mlp_width = 3072  # hidden dimension of each layer's MLP
    text.dropout = 0.0  # share of activations dropped while training
    # mean or max over the tokens without padding; mean_with_padding over all, as the authors;
    # first; checkpoint (also of sentence-transformers with dense layers after the pooling); or
    # auto, which for a folder of sentence-transformers is its own.
    text.pooling = "auto"
    # Pooling in training: auto (as `pooling`), or mean_to_longest, over as many tokens as the
    # longest caption of the batch has, as the authors.
    text.training_pooling = "auto"
    text.pooled_layers = 1  # as of the image tower
    text.frozen_layers = "none"  # as of the image tower
    text.lora_rank = 0  # as of the image tower
    # Dimension of a learned projection after pooling, 0 for none.
    encoder.projection_dim = 0
    # Width of a hidden layer of these projections, 0 for none.
    encoder.projection_hidden = 0
    # float32 or bfloat16; parameters, losses and similarities are float32 in any case.
    encoder.compute_dtype = "bfloat16"
    # Attention implementation: auto (by device and number of tokens), xla (anywhere), splash
    # (fused; TPUs in bfloat16), cudnn (fused; GPUs in bfloat16), or head_loop (long sequences on a
    # CPU, in little memory).
    encoder.attention = "auto"
    # Compile one layer and loop over it.
    encoder.scan_layers = False
    # Rematerialization: none, products (keeps the results of matrix products and of fused
    # attention), attention (keeps those of fused attention), or full (recomputes everything from a
    # layer's input).
    encoder.remat = "none"

    # Momentum m of the momentum encoders' update m <- m * momentum + (1 - m) * online.
    config.momentum = 0.995
    # Slots of the queue of momentum embeddings.
    config.queue_size = 8224

    # The objective after the warm-up (fne_jax/objectives/registry.py lists all).
    config.objective = objective = ConfigDict()
    # fne; triplets with the hardest, a semi_hard or a random key as negative; infonce (contrastive
    # over the queue); or, within the batch, clip (contrastive), multi_positive (the same with
    # several positives, at least all captions of an image) or sigmoid (SigLIP's).
    objective.name = "fne"
    # Whether candidates come from the queue too, or only from the batch.
    objective.queue = True
    # Temperature of infonce, clip, multi_positive and sigmoid (SigLIP starts at 0.1). 0 for the one
    # that a CLIP or SigLIP learned, if both towers and the embeddings are its own, and otherwise
    # 0.07 (with sigmoid for CLIP too, which learned no bias).
    objective.temperature = 0.0
    # Bias that sigmoid adds to the logits; None likewise for the one that a SigLIP learned, and
    # otherwise -10.
    objective.bias = config_dict.placeholder(float)
    # Whether these objectives learn temperature and bias further, as CLIP and SigLIP do, within
    # 0.01 to 1, or above 0.001 if it starts below 0.01; not in the warm-up.
    objective.learn_temperature = False
    # Folder of a teacher's embeddings of the training split, as `evaluate --dump` writes them; ""
    # for none. After the warm-up its similarities among images and among captions are soft targets,
    # as in CUSA: Kullback-Leibler divergences of softmax distributions are added to the loss.
    objective.teacher = ""
    objective.teacher_cross_weight = 0.1  # of the divergence of similarities across modalities
    objective.teacher_own_weight = 0.5  # of that among images and among captions
    # Temperature of these similarities; the teacher's have 1.
    objective.teacher_temperature = 0.45
    # A candidate that the teacher finds more similar to the anchor than its positive less this much
    # is excluded like a known match (GISTEmbed, NV-Retriever); None excludes none.
    objective.guide_margin = config_dict.placeholder(float)
    # Use of the complete truth, where the training split knows it (shapes does), to measure what a
    # perfect detector would gain: none; drop (true matches are excluded from the negatives and from
    # the statistics of negatives); positives (of multi_positive and sigmoid). The warm-up never
    # uses it.
    objective.oracle = "none"

    # False negative elimination, section 3 of the paper. The other triplet objectives use `margin`
    # in their loss and `prior` in their log.
    config.fne = fne = ConfigDict()
    # Epochs of warm-up; may be fractional.
    fne.start_epoch = 1.0
    # Similarity by which a positive should exceed a negative.
    fne.margin = 0.2
    # tau of the sampling weights.
    fne.tau = 0.5
    # Prior probability of a candidate being a false negative; it should follow the dataset.
    fne.prior = 1e-4
    # Posterior above which a candidate is suspected; None for ten times the prior, as the paper,
    # and at most 0.5.
    fne.posterior_threshold = config_dict.placeholder(float)
    # Positive similarities seen before anything is suspected.
    fne.min_count = 200
    # By what candidates are suspected: gaussians (of their similarity, the paper's) or listed (by
    # their probability in `data.matches`, 0 if they are not there or below `matches_negative`; no
    # pair of the file is excluded or a positive then, and `min_count` does not count).
    fne.posterior = "gaussians"
    # Exclude other captions of the same image from the warm-up loss and the statistics. The authors
    # exclude only the diagonal.
    fne.mask_same_image = True
    # The same of the weights of suspected candidates; None for tau, as the paper.
    fne.elimination_tau = config_dict.placeholder(float)
    # How suspected candidates are weighed: soft (by their posterior, the paper's), hard (never
    # negatives), or none (as ordinary ones).
    fne.elimination = "soft"
    # Whether other candidates weigh more the closer their similarity is to the positive's; without
    # it all weigh 1.
    fne.cut_down = True
    # Keep the posterior from falling as similarity rises.
    fne.monotone = False
    # 1 collects statistics over an epoch and resets them at its start, as in the paper; below 1
    # they are exponential moving averages with this decay per step, for data without epochs.
    fne.ema_decay = 1.0
    # Keys of the queue scored at a time, a multiple of 16, to save memory; 0 for all at once.
    fne.key_chunk = 0

    config.warmup = warmup = ConfigDict()
    # hardest (the paper's, for pretrained encoders); for encoders from random weights, which the
    # hardest negative collapses, clip (contrastive within the batch, the faster) or infonce
    # (contrastive over the queue).
    warmup.objective = "hardest"
    # Temperature of clip and infonce.
    warmup.temperature = 0.07
    # Fill the queue in the last steps of the warm-up, so that FNE does not start on random vectors.
    # The authors do not. (infonce fills it from the first step.)
    warmup.fill_queue = True

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 2e-5  # the peak of the schedule
    optimizer.b1 = 0.9  # Adam's decay of the mean of gradients
    optimizer.b2 = 0.999  # Adam's decay of the mean of squared gradients
    optimizer.eps = 1e-8  # Adam's addition to the divisor
    # Decoupled weight decay of matrices (biases, norms, embeddings of positions and single tokens,
    # and SigLIP's probe are left alone).
    optimizer.weight_decay = 0.0
    # Global norm that gradients are clipped to.
    optimizer.clip_norm = 2.0
    # step (times `step_factor` at each of `step_epochs`) or cosine (to 0 at the end).
    optimizer.schedule = "step"
    optimizer.step_epochs = (5.0, 15.0)  # may be fractional
    optimizer.step_factor = 0.1  # less than 1 lowers the rate
    # Epochs of linear learning-rate warm-up from 0.
    optimizer.warmup_epochs = 0.0
    # Factor on the learning rate of the image tower and its projection.
    optimizer.image_factor = 1.0
    optimizer.text_factor = 1.0  # that of the text tower
    # Factor on the learning rate of learned temperature and bias.
    optimizer.objective_factor = 1.0
    # Layer-wise decay of the learning rate: each layer's is this times that of the one above, the
    # last layer's this; 1 for the same rate everywhere.
    optimizer.layer_decay = 1.0

    config.evaluation = evaluation = ConfigDict()
    # Validations per epoch.
    evaluation.per_epoch = 3
    # Images or captions embedded at once over all devices.
    evaluation.batch_size = 256
    # Tokens of a caption in evaluation; 0 for as many as in training.
    evaluation.text_length = 0
    # Captions per image in evaluation, the first ones; 0 for all. Some COCO images have 6 or 7, of
    # which the published protocol uses 5.
    evaluation.captions_per_image = 0

    config.checkpoint = checkpoint = ConfigDict()
    # Newest checkpoints kept, besides the best by validation rSum.
    checkpoint.keep_latest = 2
    # Steps between checkpoints, besides those at validations; 0 for none.
    checkpoint.every_steps = 0

    config.logging = logging = ConfigDict()
    # Steps over which scalars are averaged before they are written.
    logging.every_steps = 50
    # Whether Weights & Biases gets TensorBoard's scalars too.
    logging.wandb = False
    # Seconds between progress lines without a terminal.
    logging.progress_seconds = 20
    # First of five steps that are profiled for TensorBoard, 0 for none.
    logging.profile_step = 0

    return config.lock()
