"""``vitshrink methods``: what there is to choose from."""

from vitshrink.cli import catalog, console
from vitshrink.cli.table import Table
from vitshrink.config.method import ALLOCATIONS


@console.reported
def methods_command() -> None:
    """List the methods, what they need, and their default allocation and compensation."""
    table = Table(["method", "needs", "allocation", "compensation", "what it does"], left=5)
    methods = catalog.methods().values()
    for method in methods:
        table.add(method.name, method.needs, method.allocation, method.compensation, method.summary)
    console.show(table)
    console.say("\noptions (--option name=value), with their defaults:", prose=True)
    for method in methods:
        if method.options:
            options = ", ".join(f"{option}={default}" for option, default in method.options.items())
            console.say(f"  {method.name}: {options}", prose=True)
    attentions = ", ".join(method.name for method in methods if method.kind == catalog.ATTENTIONS)
    console.say(f"only for plain attention (see `vitshrink inspect MODEL`): {attentions}", prose=True)
    console.say(f"allocations: {', '.join(sorted(ALLOCATIONS))}", prose=True)
