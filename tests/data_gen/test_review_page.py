# SPDX-License-Identifier: Apache-2.0
"""Claim: in a browser, with keyboard and mouse, triplets are browsed, accepted, corrected, rejected
and written, and every decision is on the disk when the page goes on. Needs Debian's `chromium` and
`chromium-driver`. IP2P_SCREENSHOT names a file for a picture of the page.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from data_gen.triplet_file import Triplet, read_triplets

EXAMPLES = Path(__file__).parents[2] / "data_gen" / "examples.jsonl"
TEXTS = {"caption": "#caption", "instruction": "#instruction", "edited": "#edited"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the first five triplets that ship with the package."""
    folder = tmp_path_factory.mktemp("review")
    lines = EXAMPLES.read_text("utf-8").splitlines(keepends=True)[:5]
    (folder / "triplets.jsonl").write_text("".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    """The page, served by the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--review", str(folder / "triplets.jsonl"), "--port", port]
    command = [sys.executable, "-m", "data_gen.triplets", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline().startswith("5 triplets: http://")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


class Browser:
    """The page as a person has it: what it shows, and keys."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver, self.wait = driver, WebDriverWait(driver, 30)

    def text(self, name: str) -> str:
        return self.driver.find_element(By.ID, name).text

    def area(self, name: str):
        return self.driver.find_element(By.CSS_SELECTOR, f"{TEXTS[name]} textarea")

    def shows(self, **texts: str) -> None:
        """Waits until the page shows this: values of the three texts, parts of others."""

        def right(_) -> bool:
            return all(
                self.area(name).get_property("value") == text
                if name in TEXTS
                else text in self.text(name)
                for name, text in texts.items()
            )

        self.wait.until(right, str(texts))

    def keys(self, *keys: str) -> None:
        self.driver.find_element(By.TAG_NAME, "body").send_keys(*keys)

    def write(self, **texts: str) -> None:
        """Puts texts in the place of what is there."""
        for name, text in texts.items():
            area = self.area(name)
            area.send_keys(Keys.CONTROL, "a")
            area.send_keys(Keys.DELETE, text)


@pytest.fixture
def browser(address) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1100,820"):
        options.add_argument(f"--{argument}")
    names = [shutil.which("chromium"), shutil.which("chromedriver")]
    assert all(names), "apt-get install chromium chromium-driver"
    options.binary_location = str(names[0])
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(names[1])))
    try:
        driver.get(address)
        WebDriverWait(driver, 60).until(
            lambda _: "undecided" in "".join(x.text for x in driver.find_elements(By.ID, "heading"))
        )
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.mark.slow
def test_a_review(folder, browser):
    file, kept = folder / "triplets.jsonl", folder / "triplets.reviewed.jsonl"
    first, second, third, fourth, fifth = read_triplets(file)
    browser.shows(caption=first.input, instruction=first.edit, heading="1 of 5 · undecided")

    browser.keys("j")  # browse
    browser.shows(caption=second.input, heading="2 of 5")
    browser.keys(Keys.ARROW_LEFT)
    browser.shows(caption=first.input, heading="1 of 5")

    browser.keys("a")  # accept
    browser.shows(caption=second.input, heading="1 accepted", note=f"accepted: {first.edit}")
    assert read_triplets(kept) == [first]

    browser.keys("e")  # correct: the instruction has the focus, and its letters are letters
    active = browser.driver.switch_to.active_element
    assert active.get_property("value") == second.edit
    active.send_keys(", a worn one", Keys.CONTROL, Keys.ENTER)
    browser.shows(caption=third.input, heading="1 corrected")
    corrected = second._replace(edit=f"{second.edit}, a worn one")
    assert read_triplets(kept) == [first, corrected]
    if "IP2P_SCREENSHOT" in os.environ:
        browser.driver.save_screenshot(os.environ["IP2P_SCREENSHOT"])

    browser.keys("r")  # reject
    browser.shows(caption=fourth.input, heading="1 rejected")
    browser.driver.find_element(By.ID, "next").click()
    browser.shows(caption=fifth.input)
    browser.keys("k")
    browser.shows(caption=fourth.input)

    browser.write(edited=fourth.input)  # wrong: nothing is saved, what was written stays
    browser.driver.find_element(By.ID, "accept").click()
    browser.shows(edited=fourth.input, note="the edited caption is the caption")
    assert read_triplets(kept) == [first, corrected]

    browser.keys(Keys.ESCAPE, "n")  # write
    browser.shows(caption="", heading="New triplet")
    browser.write(caption="eine Katze", instruction="mach „Hund“ daraus", edited="ein <b>Hund</b>")
    browser.area("edited").send_keys(Keys.CONTROL, Keys.ENTER)
    browser.shows(caption="", heading="1 written")
    written = Triplet("eine Katze", "mach „Hund“ daraus", "ein <b>Hund</b>")
    assert read_triplets(kept) == [first, corrected, written]

    browser.keys(Keys.ESCAPE, "u")  # the next that is undecided
    browser.shows(caption=fourth.input, heading="4 of 6 · undecided")
    browser.driver.refresh()
    browser.shows(caption=fourth.input, heading="1 accepted, 1 corrected, 1 rejected, 1 written")
    decided = (folder / "triplets.review.jsonl").read_text("utf-8").splitlines()
    expected = ["accepted", "corrected", "rejected", "written"]
    assert [json.loads(line)["what"] for line in decided] == expected
    assert not [x for x in browser.driver.get_log("browser") if x["level"] == "SEVERE"]
