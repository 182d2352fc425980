"""``vitshrink methods``: what there is to choose from."""

from vitshrink.cli import console
from vitshrink.cli.tables import Table
from vitshrink.compression.allocation import ALLOCATIONS
from vitshrink.methods import attention_methods, available_methods, find_method


@console.reported
def methods_command() -> None:
    """List the methods, what they need, and the allocation and compensation that go with them."""
    table = Table(["method", "needs", "allocation", "compensation", "what it does"], left=5)
    for name in [*available_methods(), *attention_methods()]:
        method = find_method(name)
        table.add(name, method.needs.value, method.allocation, method.compensation, method.summary)
    console.show(table)
    console.say("\noptions (--option name=value), with their defaults:", prose=True)
    for name in [*available_methods(), *attention_methods()]:
        if options := find_method(name).options:
            console.say(
                f"  {name}: {', '.join(f'{option}={default}' for option, default in options.items())}", prose=True
            )
    console.say(f"allocations: {', '.join(sorted(ALLOCATIONS))}", prose=True)
