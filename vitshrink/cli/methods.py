"""``vitshrink methods``: what there is to choose from."""

from vitshrink.allocation import ALLOCATIONS
from vitshrink.cli import console
from vitshrink.cli.tables import Table
from vitshrink.methods import attention_methods, available_methods, find_method


@console.reported
def methods_command() -> None:
    """List the methods, what they need, and the allocation and compensation that go with them."""
    table = Table(["method", "needs", "allocation", "compensation", "what it does"], left=5)
    for name in [*available_methods(), *attention_methods()]:
        method = find_method(name)
        table.add(name, method.needs.value, method.allocation, method.compensation, method.summary)
    console.show(table)
    console.output.print(f"\nallocations: {', '.join(sorted(ALLOCATIONS))}")
