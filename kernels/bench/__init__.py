"""The benchmark of the mixture-of-experts layer: every shape and regime, against every peer on the machine."""

if __name__ != "nmm_serve.kernels.bench":
    raise ImportError(
        f"{__name__!r} was picked up from the source folder because the current directory is on sys.path; "
        "import nmm_serve.kernels.bench, and start Python with -P (or PYTHONSAFEPATH=1) from here"
    )
