"""Drives two monitors with QEMU's own QMP package: client.py SOURCE-SOCKET DESTINATION-SOCKET MIGRATION-SOCKET."""

import asyncio
import json
import sys

from qemu.qmp import ConnectError, ExecuteError, QMPClient


async def connected(name, path):
    """A client of the monitor at path, as soon as it listens."""
    while True:
        client = QMPClient(name)
        try:
            await client.connect(path)
            return client
        except ConnectError:
            await asyncio.sleep(0.01)


async def main(source_path, destination_path, migration_path):
    source = await connected("source", source_path)
    destination = await connected("destination", destination_path)
    told = {"greeting": sorted(source.greeting._asdict()["QMP"])}
    told["status"] = (await source.execute("query-status"))["status"]
    told["commands"] = len(await source.execute("query-commands"))
    try:
        await source.execute("migrate-set-parameters", {"downtime-limit": 2000001})
    except ExecuteError as error:
        told["refused"] = [error.error_class, str(error)]
    events = []
    # The passes come between, in any number.
    with source.listener() as heard, destination.listener(("RESUME",)) as resumed:
        for client in (source, destination):
            await client.execute(
                "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
            )
        uri = {"uri": "unix:" + migration_path}
        await destination.execute("migrate-incoming", uri)
        await source.execute("migrate", uri)
        async for event in heard:
            if event["event"] == "MIGRATION_PASS":
                continue
            status = event.get("data", {}).get("status")
            events.append(status or event["event"])
            if status in ("completed", "failed"):
                break
        await resumed.get()
    told["events"] = events
    told["migration"] = (await source.execute("query-migrate"))["status"]
    told["arrived"] = (await destination.execute("query-status"))["status"]
    await source.execute("quit")
    await destination.execute("quit")
    print(json.dumps(told))


asyncio.run(asyncio.wait_for(main(*sys.argv[1:]), 240))
