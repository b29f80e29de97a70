"""What the providers that have to be installed have in common."""

from importlib.metadata import PackageNotFoundError, version

from torch_bptt.bench import Provider


class Peer(Provider):
    needs: tuple[str, ...]  # distributions; the first gives the version

    @property
    def version(self) -> str:
        return version(self.needs[0])

    def missing(self) -> str | None:
        for name in self.needs:
            try:
                version(name)
            except PackageNotFoundError:
                return f"not installed: pip install {' '.join(self.needs)} (or make bench-peers)"
        return None
