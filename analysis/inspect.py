"""See `analysis/inspection.py`, which has all of it."""

if __name__ == "inspect":
    # Python looks for modules in the folder of a script first. If another script of this folder, or
    # a library, imports Python's own `inspect`, Python finds this file; it loads Python's module.
    import os
    import sys
    from importlib.util import module_from_spec, spec_from_file_location

    _spec = spec_from_file_location("inspect", f"{os.path.dirname(os.__file__)}/inspect.py")
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["inspect"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["inspect"])
else:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

    from analysis import inspection
    from analysis.inspection import Config, look, main
    from utils.process.script import run_script

    __doc__ = inspection.__doc__
    __all__ = ["Config", "look", "main"]

    if __name__ == "__main__":
        run_script(main)
